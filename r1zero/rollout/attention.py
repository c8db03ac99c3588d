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

    An entry is a sample's use of a block. Entries are numbered own blocks first, then shared blocks times
    group members; entry E, the last, stands for no block. A sample has at most W entries.
    """

    def __init__(self, rows: Sequence[Row], pool: BlockPool, group_size: int, device: torch.device) -> None:
        count, block = len(rows), pool.block
        self.pool, self.count = pool, count
        self.own_start, self.shared_range = pool.own_start, pool.shared_range
        num_own = pool.num_blocks - self.own_start
        width = max(len(row.shared) + len(row.own) for row in rows)
        own = np.full(num_own, count * width)  # place (row, entry) of each own block; the last place is nobody's
        shared = np.full((self.shared_range, group_size), count * width)
        entries = np.full((count, width), num_own + shared.size)
        self.last_block = np.empty(count, dtype=np.int64)
        members: dict[int, int] = {}
        for number, row in enumerate(rows):
            member = members.get(row.position, 0)
            members[row.position] = member + 1
            blocks, places = np.asarray(row.own) - self.own_start, number * width + np.arange(width)
            whole, total = len(row.shared), len(row.shared) + len(row.own)
            shared[row.shared, member] = places[:whole]
            own[blocks] = places[whole:total]
            entries[number, :whole] = num_own + np.asarray(row.shared, dtype=np.int64) * group_size + member
            entries[number, whole:total] = blocks
            self.last_block[number] = row.own[-1]
        self.width = width
        self._first = np.arange(width)[:, None] * block + np.arange(block)  # place of each slot in its sequence
        self.own, self.shared, self.entries = (torch.from_numpy(x).to(device) for x in (own, shared, entries))
        self.own_rows, self.shared_rows = self.own // width, self.shared // width
        self._tables = [row.shared + row.own for row in rows]

    def step(self, positions: np.ndarray) -> Step:
        """Prepare one step in which row i's new token stands at `positions[i]` of its sequence."""
        device, block = self.entries.device, self.pool.block
        seen = self._first <= positions[:, None, None]
        hidden = torch.from_numpy(np.where(seen, np.float32(0), np.float32(HIDDEN))).view(self.count, 1, 1, -1)
        return Step(self, torch.from_numpy(self.last_block).to(device), torch.from_numpy(positions % block).to(device),
                    hidden.to(device), (positions + 1).tolist())

    def block_table(self) -> torch.Tensor:
        """Blocks of each row in order, int32 [n, most blocks]: what the NPU's fused attention reads."""
        table = torch.zeros(self.entries.shape, dtype=torch.int32)
        for number, blocks in enumerate(self._tables):
            table[number, :len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        return table.to(self.entries.device)


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one decoding step share."""

    layout: Layout
    block: torch.Tensor  # int64 [n], where each row's new token goes
    offset: torch.Tensor  # int64 [n]
    hidden: torch.Tensor  # fp32 [n, 1, 1, W * block], added to the scores
    lengths: list[int]  # tokens of each row, the new one included

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Write the new keys and values, then attend. query [n, heads, D], key, value [n, kv heads, D] -> [n, heads * D]."""
        pool = self.layout.pool
        keys, values = pool.keys[layer], pool.values[layer]
        keys[self.block, :, self.offset] = key
        values[self.block, :, self.offset] = value
        if query.device.type == "npu":
            return npu_paged_attention(query, keys, values, self.layout.block_table(), self.lengths)
        return self._by_blocks(query, keys, values)

    def _by_blocks(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        layout, (count, heads, dim), kv_heads = self.layout, query.shape, keys.shape[1]
        own, shared = slice(layout.own_start, None), slice(0, layout.shared_range)
        padded = torch.cat([query, query.new_zeros(1, heads, dim)]).view(count + 1, kv_heads, -1, dim)
        scores = _join(_product(padded[layout.own_rows], keys[own].transpose(2, 3)),
                       _product(_to_groups(padded[layout.shared_rows]), keys[shared].transpose(2, 3)), layout)
        by_row = scores[layout.entries].permute(0, 2, 3, 1, 4)  # [n, kv heads, heads per kv head, W, block]
        weights = torch.add(self.hidden, by_row.reshape(*by_row.shape[:3], -1), alpha=dim**-0.5).softmax(dim=-1)
        weights = weights.to(values.dtype).view(by_row.shape).permute(0, 3, 1, 2, 4).flatten(0, 1)
        weights = torch.cat([weights, _zeros_like_one(weights)])  # [n * W + 1, kv heads, heads per kv head, block]
        found = _join(_product(weights[layout.own], values[own]),
                      _product(_to_groups(weights[layout.shared]), values[shared]), layout)
        return found[layout.entries].sum(dim=1).view(count, -1)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Batched product over the first two axes: [blocks, kv heads, a, b] x [blocks, kv heads, b, c]."""
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).view(*left.shape[:3], right.shape[-1])


def _to_groups(rows: torch.Tensor) -> torch.Tensor:
    """Let group members be rows of one product: [blocks, G, kv heads, m, x] -> [blocks, kv heads, G * m, x]."""
    return rows.transpose(1, 2).flatten(2, 3)


def _join(own: torch.Tensor, shared: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Number what was found by entry, [E + 1, kv heads, m, x]; the last one is zero."""
    blocks, kv_heads, rows, last = shared.shape
    members = layout.shared.shape[1]
    shared = shared.view(blocks, kv_heads, members, rows // members, last).transpose(1, 2).flatten(0, 1)
    return torch.cat([own, shared, _zeros_like_one(own)])


def _zeros_like_one(entries: torch.Tensor) -> torch.Tensor:
    return entries.new_zeros(1, *entries.shape[1:])
