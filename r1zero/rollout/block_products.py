"""Paged attention by batched matrix products over the blocks in use, where no kernel does it.

Nothing is padded to the longest sample and no key is copied. Each block is one small product of its
queries with its keys: for a sample's own block the query heads that share a kv head, for a shared
prompt block those of the whole group. The scores, small beside the keys, are then gathered by
sample for one softmax, dealt back to the blocks for the product with the values, and summed by
sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from r1zero.rollout.kv_cache import BlockPool, SampleBlocks

MASK_BIAS = -1e30  # a score that no softmax sees, yet finite: an all-hidden block must not give nan


class BlockProducts:
    """Tables that deal queries to blocks and gather what blocks found.

    An entry is a sample's use of a block; a sample has at most W. All tables are numbers of rows in
    flat [rows, x] views, so that every rearrangement of a step is one copy of rows. K kv heads, m
    heads each, G a group's samples.
    """

    def __init__(
        self,
        rows: Sequence[SampleBlocks],
        pool: BlockPool,
        group_size: int,
        heads: int,
        device: torch.device,
    ) -> None:
        count = len(rows)
        block = pool.block
        kv_heads = pool.keys.shape[2]
        self.pool = pool
        self.device = device
        self.own_start = pool.own_start
        self.shared_range = pool.shared_range
        num_own = pool.num_blocks - self.own_start
        shape = (kv_heads, heads // kv_heads)
        width = max(len(row.shared) + len(row.own) for row in rows)
        # Blocks that nobody uses compute for sample 0, and nobody reads what they find.
        own = np.zeros((2, num_own), np.int64)
        shared = np.zeros((2, self.shared_range, group_size), np.int64)
        heads_of_own = np.arange(num_own * heads).reshape(num_own, *shape)
        heads_of_shared = num_own * heads + np.arange(
            self.shared_range * group_size * heads
        ).reshape(self.shared_range, kv_heads, group_size, shape[1]).transpose(0, 2, 1, 3)
        nothing = (num_own + self.shared_range * group_size) * heads
        entries = np.full((count, *shape, width), nothing)  # [n, K, m, W]
        members: dict[int, int] = {}
        for number, row in enumerate(rows):
            member = members.get(row.position, 0)
            members[row.position] = member + 1
            mine = np.asarray(row.own) - self.own_start
            whole = len(row.shared)
            total = whole + len(row.own)
            shared[0, row.shared, member], shared[1, row.shared, member] = number, np.arange(whole)
            own[0, mine], own[1, mine] = number, np.arange(whole, total)
            entries[number, ..., :whole] = np.moveaxis(heads_of_shared[row.shared, member], 0, -1)
            entries[number, ..., whole:total] = np.moveaxis(heads_of_own[mine], 0, -1)
        head = np.arange(heads).reshape(shape)
        # Place of each slot in its sequence.
        self._places = torch.arange(width * block, device=device).view(1, 1, -1)
        # Query rows [n * heads], weight rows [n * heads * W]: own [blocks, K, m], shared [blocks,
        # K, G, m].
        own = own[:, :, None, None]
        shared = shared[:, :, None, :, None]
        own_queries = own[0] * heads + head
        shared_queries = shared[0] * heads + head[:, None]
        self.own_queries, self.own_weights = (
            self._flat(own_queries),
            self._flat(own_queries * width + own[1]),
        )
        self.shared_queries = self._flat(shared_queries)
        self.shared_weights = self._flat(shared_queries * width + shared[1])
        self.entries = self._flat(entries)

    def mask_bias(self, positions: torch.Tensor) -> torch.Tensor:
        """fp32 [n, 1, W * block]: zero for the tokens up to each row's position, MASK_BIAS
        beyond."""
        return torch.where(self._places <= positions[:, None, None], 0.0, MASK_BIAS)

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor
    ) -> torch.Tensor:
        """query [n, heads, D], keys and values [blocks, kv heads, block, D] -> [n, heads * D]."""
        count, heads, dim = query.shape
        queries = query.reshape(-1, dim)
        scale = dim**-0.5
        own = [x[self.own_start :].flatten(0, 1) for x in (keys, values)]
        shared = [x[: self.shared_range].flatten(0, 1) for x in (keys, values)]
        scores = torch.cat(
            [
                _product(queries, self.own_queries, own[0].transpose(1, 2)),
                _product(queries, self.shared_queries, shared[0].transpose(1, 2)),
                keys.new_zeros(1, self.pool.block),
            ]
        )
        # [n, heads, W * block]
        by_sample = scores.index_select(0, self.entries).view(count, heads, -1)
        weights = torch.add(hidden, by_sample, alpha=scale).softmax(dim=-1).to(values.dtype)
        weights = weights.view(-1, self.pool.block)  # [n * heads * W, block]
        found = torch.cat(
            [
                _product(weights, self.own_weights, own[1]),
                _product(weights, self.shared_weights, shared[1]),
                values.new_zeros(1, dim),
            ]
        )
        return (
            found.index_select(0, self.entries)
            .view(count, heads, -1, dim)
            .sum(dim=2)
            .view(count, -1)
        )

    def _flat(self, table: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(table).reshape(-1)).to(self.device)


def _product(rows: torch.Tensor, chosen: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Multiply the chosen rows [N, x], dealt evenly to B blocks, with blocks [B, x, y] -> [N,
    y]."""
    if not len(chosen):
        return rows.new_empty(0, blocks.shape[2])
    dealt = rows.index_select(0, chosen).view(len(blocks), -1, rows.shape[1])
    return torch.bmm(dealt, blocks).view(-1, blocks.shape[2])
