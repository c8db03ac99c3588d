"""Attention of one decoding step over the blocks in use: it costs what the live tokens cost.

Nothing is padded to the longest sample and no key is copied. Each block is one small product of its
queries with its keys: for a sample's own block the query heads that share a kv head, for a shared prompt
block those of the whole group. The scores, small beside the keys, are then gathered by sample for one
softmax, dealt back to the blocks for the product with the values, and summed by sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from r1zero.rollout.kv_cache import BlockPool
from r1zero.world.device import npu_paged_attention

HIDDEN = -1e30  # a score that no softmax sees, yet finite: an all-hidden block must not give nan


@dataclass(frozen=True, slots=True)
class Row:
    """Where one running sample keeps its tokens: shared blocks of its prompt, then its own."""

    position: int  # of its prompt: rows of one group share blocks
    shared: list[int]
    own: list[int]


class Layout:
    """Who attends to which blocks, for n running samples. Rebuilt when a sample or a block comes or goes.

    An entry is a sample's use of a block; a sample has at most W. All tables are numbers of rows in flat
    [rows, x] views, so that every rearrangement of a step is one copy of rows. K kv heads, m heads each, G group.
    """

    def __init__(self, rows: Sequence[Row], pool: BlockPool, group_size: int, heads: int, device: torch.device) -> None:
        count, block, kv_heads = len(rows), pool.block, pool.keys.shape[2]
        self.pool, self.count = pool, count
        self.own_start, self.shared_range = pool.own_start, pool.shared_range
        num_own, shape = pool.num_blocks - self.own_start, (kv_heads, heads // kv_heads)
        width = max(len(row.shared) + len(row.own) for row in rows)
        # Blocks that nobody uses compute for sample 0, and nobody reads what they find.
        own, shared = np.zeros((2, num_own), np.int64), np.zeros((2, self.shared_range, group_size), np.int64)
        heads_of_own = np.arange(num_own * heads).reshape(num_own, *shape)
        heads_of_shared = num_own * heads + np.arange(self.shared_range * group_size * heads).reshape(
            self.shared_range, kv_heads, group_size, shape[1]).transpose(0, 2, 1, 3)
        nothing = (num_own + self.shared_range * group_size) * heads
        entries = np.full((count, *shape, width), nothing)  # [n, K, m, W]
        self.last_block = np.empty(count, dtype=np.int64)
        members: dict[int, int] = {}
        for number, row in enumerate(rows):
            member = members.get(row.position, 0)
            members[row.position] = member + 1
            mine, whole, total = np.asarray(row.own) - self.own_start, len(row.shared), len(row.shared) + len(row.own)
            shared[0, row.shared, member], shared[1, row.shared, member] = number, np.arange(whole)
            own[0, mine], own[1, mine] = number, np.arange(whole, total)
            entries[number, ..., :whole] = np.moveaxis(heads_of_shared[row.shared, member], 0, -1)
            entries[number, ..., whole:total] = np.moveaxis(heads_of_own[mine], 0, -1)
            self.last_block[number] = row.own[-1]
        self._first = np.arange(width)[:, None] * block + np.arange(block)  # place of each slot in its sequence
        head = np.arange(heads).reshape(shape)

        def flat(table: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(table).reshape(-1)).to(device)

        # Query rows [n * heads] and weight rows [n * heads * W] for own [blocks, K, m] and shared [blocks, K, G, m].
        own, shared = own[:, :, None, None], shared[:, :, None, :, None]
        own_queries, shared_queries = own[0] * heads + head, shared[0] * heads + head[:, None]
        self.own_queries, self.own_weights = flat(own_queries), flat(own_queries * width + own[1])
        self.shared_queries, self.shared_weights = flat(shared_queries), flat(shared_queries * width + shared[1])
        self.entries, self.width = flat(entries), width
        self._device = device
        # Blocks of each row in order, int32 [n, W]: what the NPU's fused attention reads.
        tables = [row.shared + row.own + [0] * (width - len(row.shared) - len(row.own)) for row in rows]
        self.block_table = torch.tensor(tables, dtype=torch.int32, device=device)

    def step(self, positions: np.ndarray) -> Step:
        """Prepare one step in which row i's new token stands at `positions[i]` of its sequence."""
        seen = self._first <= positions[:, None, None]
        hidden = torch.from_numpy(np.where(seen, np.float32(0), np.float32(HIDDEN)).reshape(self.count, 1, -1))
        return Step(self, torch.from_numpy(self.last_block).to(self._device),
                    torch.from_numpy(positions % self.pool.block).to(self._device), hidden.to(self._device),
                    (positions + 1).tolist())


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one decoding step share."""

    layout: Layout
    block: torch.Tensor  # int64 [n], where each row's new token goes
    offset: torch.Tensor  # int64 [n]
    hidden: torch.Tensor  # fp32 [n, 1, W * block], added to the scores
    lengths: list[int]  # tokens of each row, the new one included

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Write the new keys and values, then attend. query [n, heads, D], key, value [n, kv heads, D] -> [n, heads * D]."""
        pool = self.layout.pool
        keys, values = pool.keys[layer], pool.values[layer]
        keys[self.block, :, self.offset] = key
        values[self.block, :, self.offset] = value
        if query.device.type == "npu":
            return npu_paged_attention(query, keys, values, self.layout.block_table, self.lengths)
        return self._by_blocks(query, keys, values)

    def _by_blocks(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        layout, (count, heads, dim) = self.layout, query.shape
        queries, scale = query.reshape(-1, dim), dim**-0.5
        own = [x[layout.own_start:].flatten(0, 1) for x in (keys, values)]
        shared = [x[:layout.shared_range].flatten(0, 1) for x in (keys, values)]
        scores = torch.cat([_product(queries, layout.own_queries, own[0].transpose(1, 2)),
                            _product(queries, layout.shared_queries, shared[0].transpose(1, 2)),
                            keys.new_zeros(1, layout.pool.block)])
        by_sample = scores.index_select(0, layout.entries).view(count, heads, -1)  # [n, heads, W * block]
        weights = torch.add(self.hidden, by_sample, alpha=scale).softmax(dim=-1).to(values.dtype)
        weights = weights.view(-1, layout.pool.block)  # [n * heads * W, block]
        found = torch.cat([_product(weights, layout.own_weights, own[1]),
                           _product(weights, layout.shared_weights, shared[1]), values.new_zeros(1, dim)])
        return found.index_select(0, layout.entries).view(count, heads, -1, dim).sum(dim=2).view(count, -1)


def _product(rows: torch.Tensor, chosen: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Multiply the chosen rows [N, x], dealt evenly to B blocks, with blocks [B, x, y] -> [N, y]."""
    if not len(chosen):
        return rows.new_empty(0, blocks.shape[2])
    dealt = rows.index_select(0, chosen).view(len(blocks), -1, rows.shape[1])
    return torch.bmm(dealt, blocks).view(-1, blocks.shape[2])
