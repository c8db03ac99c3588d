"""Paged attention: block tables, and what all layers of a decoding step share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from r1zero.rollout.block_products import BlockProducts
from r1zero.rollout.kv_cache import BlockPool, SampleBlocks


class DecodeLayout:
    """Who attends to which blocks, for n running samples. Rebuilt when a sample or a block comes or
    goes."""

    def __init__(
        self,
        rows: Sequence[SampleBlocks],
        pool: BlockPool,
        group_size: int,
        heads: int,
        device: torch.device,
    ) -> None:
        self.rows = rows
        self.pool = pool
        self.group_size = group_size
        self.heads = heads
        self.device = device
        self.width = max(len(row.shared) + len(row.own) for row in rows)
        tables = [
            row.shared + row.own + [0] * (self.width - len(row.shared) - len(row.own))
            for row in rows
        ]
        # [n, W] blocks of each row
        self.table = torch.tensor(tables, dtype=torch.int32, device=device)
        self.last_block = torch.tensor([row.own[-1] for row in rows], device=device)

    @functools.cached_property
    def products(self) -> BlockProducts:
        """The tables of attention by products, where nothing reads the block table itself."""
        return BlockProducts(self.rows, self.pool, self.group_size, self.heads, self.device)


class DecodeStep:
    """What all layers of a decoding step share. SampleBlocks i's new token stands at `positions[i]`
    of its tokens.

    With blocks of 4, a sample with two blocks of its prompt and block 7 is about to write its tenth
    token, so to place 1 of block 7; another one its third, to place 2 of block 6:

    >>> from types import SimpleNamespace
    >>> samples = [SampleBlocks(0, [0, 1], [7]), SampleBlocks(1, [], [6])]
    >>> pool = SimpleNamespace(block=4)
    >>> step = DecodeStep(DecodeLayout(samples, pool, 1, 1, torch.device("cpu")), np.array([9, 2]))
    >>> step.layout.table.tolist()
    [[0, 1, 7], [6, 0, 0]]
    >>> step.lengths, step.block.tolist(), step.offset.tolist()
    ([10, 3], [7, 6], [1, 2])
    """

    def __init__(self, layout: DecodeLayout, positions: np.ndarray) -> None:
        self.layout = layout
        self.lengths = (positions + 1).tolist()  # tokens of each row, the new one included
        self.positions = torch.from_numpy(positions.copy()).to(layout.device)  # int64 [n]
        # Where the new token goes.
        self.offset = self.positions % layout.pool.block
        self.block = layout.last_block

    @functools.cached_property
    def mask_bias(self) -> torch.Tensor:
        """fp32 [n, 1, W * block], added to the scores: hides what lies beyond each row's tokens."""
        return self.layout.products.mask_bias(self.positions)


@dataclass(frozen=True, slots=True)
class PassOutput:
    """What the layers leave of a pass over T tokens."""

    hidden: torch.Tensor  # [T, H] behind the last norm: the output layer's input
    routes: torch.Tensor | None  # uint8 [T, MoE layers, k], the experts of each token

    def first(self, rows: int) -> PassOutput:
        """That of the first tokens."""
        if self.routes is None:
            return PassOutput(self.hidden[:rows], None)
        return PassOutput(self.hidden[:rows], self.routes[:rows])
