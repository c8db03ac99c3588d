"""Attention of one decoding step over the blocks in use: it costs what the live tokens cost.

Nothing is padded to the longest sample and no key is copied. Each block is one small product of its
queries with its keys: for a sample's own block the query heads that share a kv head, for a shared prompt
block those of the whole group. Per block there is a maximum, a sum of weights and a weighted sum of
values; a sample's result is the merge of its blocks' (Flash-Decoding: split the keys, then combine).
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
    """Who attends to which blocks, for n running samples. Rebuilt when a sample or a block comes or goes."""

    def __init__(self, rows: Sequence[Row], pool: BlockPool, group_size: int, device: torch.device) -> None:
        count, block = len(rows), pool.block
        self.pool, self.count = pool, count
        self.own_start, self.shared_range = pool.own_start, pool.shared_range
        num_own = pool.num_blocks - self.own_start
        own_rows = np.full(num_own, count)  # `count` is a row that nobody reads
        own_first = np.zeros(num_own, dtype=np.int64)  # place in its sequence of each own block's first token
        shared_rows = np.full((self.shared_range, group_size), count)
        width = max(len(row.shared) + len(row.own) for row in rows)
        merge = np.full((count, width), num_own + shared_rows.size)  # the last entry is one that is all hidden
        self.last_block = np.empty(count, dtype=np.int64)
        members: dict[int, int] = {}
        for number, row in enumerate(rows):
            member = members.get(row.position, 0)
            members[row.position] = member + 1
            shared_rows[row.shared, member] = number
            own = np.asarray(row.own) - self.own_start
            own_rows[own] = number
            own_first[own] = (len(row.shared) + np.arange(len(own))) * block
            merge[number, :len(row.shared)] = num_own + np.asarray(row.shared, dtype=np.int64) * group_size + member
            merge[number, len(row.shared):len(row.shared) + len(own)] = own
            self.last_block[number] = row.own[-1]
        self._own_rows, self._own_first = own_rows, own_first
        self.own_rows, self.shared_rows, self.merge = (
            torch.from_numpy(x).to(device) for x in (own_rows, shared_rows, merge))
        self._tables = [row.shared + row.own for row in rows]

    def step(self, positions: np.ndarray) -> Step:
        """Prepare one step in which row i's new token stands at `positions[i]` of its sequence."""
        device, block = self.merge.device, self.pool.block
        lengths = np.append(positions + 1, 0)
        fill = lengths[self._own_rows] - self._own_first
        hidden = torch.from_numpy(np.where(np.arange(block) < fill[:, None], np.float32(0), np.float32(HIDDEN)))
        return Step(self, torch.from_numpy(self.last_block).to(device), torch.from_numpy(positions % block).to(device),
                    hidden.to(device), lengths[:-1].tolist())

    def block_table(self) -> torch.Tensor:
        """Blocks of each row in order, int32 [n, most blocks]: what the NPU's fused attention reads."""
        table = torch.zeros(self.merge.shape, dtype=torch.int32)
        for number, blocks in enumerate(self._tables):
            table[number, :len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        return table.to(self.merge.device)


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one decoding step share."""

    layout: Layout
    block: torch.Tensor  # int64 [n], where each row's new token goes
    offset: torch.Tensor  # int64 [n]
    hidden: torch.Tensor  # fp32 [own blocks, block], added to the scores
    lengths: list[int]  # tokens of each row, the new one included

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Write the new keys and values, then attend. query [n, heads, D], key, value [n, kv heads, D] -> [n, heads * D]."""
        pool = self.layout.pool
        keys, values = pool.keys[layer], pool.values[layer]
        keys[self.block, :, self.offset] = key
        values[self.block, :, self.offset] = value
        if query.device.type == "npu":
            return npu_paged_attention(query, keys, values, self.layout.block_table(), self.lengths)
        return self._merge(query, keys, values)

    def _merge(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        layout, (count, heads, dim) = self.layout, query.shape
        kv_heads = keys.shape[1]
        padded = torch.cat([query, query.new_zeros(1, heads, dim)]).view(count + 1, kv_heads, -1, dim)
        own = padded[layout.own_rows]  # [own blocks, kv heads, heads per kv head, D]
        parts = [_partial(own, keys[layout.own_start:], values[layout.own_start:], self.hidden[:, None, None])]
        if layout.shared_range:
            shared = padded[layout.shared_rows].transpose(1, 2).flatten(2, 3)  # group members become rows, too
            found = _partial(shared, keys[:layout.shared_range], values[:layout.shared_range], None)
            size = (layout.shared_range, kv_heads, layout.shared_rows.shape[1], -1)
            parts.append(tuple(x.view(*size, *x.shape[3:]).transpose(1, 2).flatten(0, 1) for x in found))
        top, total, weighted = (torch.cat([*columns, _nothing(columns[0], fill)])[layout.merge] for columns, fill in
                                zip(zip(*parts, strict=True), (HIDDEN, 0.0, 0.0), strict=True))
        scale = torch.exp(top - top.amax(dim=1, keepdim=True))  # [n, blocks, kv heads, heads per kv head]
        total = (total * scale).sum(dim=1)
        return ((weighted * scale[..., None]).sum(dim=1) / total[..., None]).to(query.dtype).view(count, -1)


def _partial(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
             hidden: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention inside each block. query [blocks, kv heads, m, D], keys [blocks, kv heads, block, D].

    Returns fp32 maximum and sum of weights [blocks, kv heads, m], and the weighted values [..., D].
    """
    size = query.shape[:3]
    flat = query.flatten(0, 1)
    scores = torch.bmm(flat, keys.flatten(0, 1).transpose(1, 2)).view(*size, -1).float().mul_(query.shape[-1]**-0.5)
    if hidden is not None:
        scores += hidden
    top = scores.amax(dim=-1)
    weights = scores.sub_(top[..., None]).exp_()
    weighted = torch.bmm(weights.to(values.dtype).flatten(0, 1), values.flatten(0, 1))
    return top, weights.sum(dim=-1), weighted.view(*size, -1)


def _nothing(like: torch.Tensor, fill: float) -> torch.Tensor:
    return like.new_full((1, *like.shape[1:]), fill)
