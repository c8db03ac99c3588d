"""Which running samples attend to which blocks, and one decoding step of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from r1zero.rollout.block_products import BlockProducts
from r1zero.rollout.kv_cache import BlockPool, SampleBlocks


class Layout:
    """Who attends to which blocks, for n running samples. Rebuilt when a sample or a block comes or goes."""

    def __init__(self, rows: Sequence[SampleBlocks], pool: BlockPool, group_size: int, heads: int,
                 device: torch.device) -> None:
        self.rows, self.pool, self.group_size, self.heads, self.device = rows, pool, group_size, heads, device
        self.width = max(len(row.shared) + len(row.own) for row in rows)
        tables = [row.shared + row.own + [0] * (self.width - len(row.shared) - len(row.own)) for row in rows]
        self.table = torch.tensor(tables, dtype=torch.int32, device=device)  # [n, W] blocks of each row
        self.last_block = torch.tensor([row.own[-1] for row in rows], device=device)

    @functools.cached_property
    def products(self) -> BlockProducts:
        """The tables of attention by products, where nothing reads the block table itself."""
        return BlockProducts(self.rows, self.pool, self.group_size, self.heads, self.device)


class Step:
    """What all layers of a decoding step share. SampleBlocks i's new token stands at `positions[i]` of its tokens."""

    def __init__(self, layout: Layout, positions: np.ndarray) -> None:
        self.layout = layout
        self.lengths = (positions + 1).tolist()  # tokens of each row, the new one included
        self.positions = torch.from_numpy(positions.copy()).to(layout.device)  # int64 [n]
        # Where the new token goes.
        self.block, self.offset = layout.last_block, self.positions % layout.pool.block

    @functools.cached_property
    def hidden(self) -> torch.Tensor:
        """fp32 [n, 1, W * block], added to the scores: hides what lies beyond each row's tokens."""
        return self.layout.products.hidden(self.positions)
