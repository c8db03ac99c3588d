"""Paged attention by batched matrix products over the blocks in use, where no kernel does it.

Nothing is padded to the longest sample and no key is copied. Each block is one small product of its
queries with its keys: for a sample's own block the query heads that share a kv head, for a shared
prompt block those of the whole group. The scores, small beside the keys, are then gathered by
sample for one softmax, dealt back to the blocks for the product with the values, and summed by
sample. block_tables.py draws which row goes where.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from r1zero.rollout.block_tables import block_tables
from r1zero.rollout.kv_cache import BlockPool, SampleBlocks

MASK_BIAS = -1e30  # a score that no softmax sees, yet finite: an all-hidden block must not give nan


class BlockProducts:
    """Attention of the running samples over their blocks, by tables that are made once."""

    def __init__(
        self,
        rows: Sequence[SampleBlocks],
        pool: BlockPool,
        group_size: int,
        heads: int,
        device: torch.device,
    ) -> None:
        self.pool = pool
        self.device = device
        self.own_start = pool.own_start
        self.shared_range = pool.shared_range
        tables = block_tables(
            rows,
            pool.num_blocks,
            self.own_start,
            self.shared_range,
            group_size,
            kv_heads=pool.keys.shape[2],
            heads=heads,
        )
        self.own_queries = self._flat(tables.own_queries)
        self.own_weights = self._flat(tables.own_weights)
        self.shared_queries = self._flat(tables.shared_queries)
        self.shared_weights = self._flat(tables.shared_weights)
        self.entries = self._flat(tables.entries)
        # Place of each slot in its sequence.
        slots = tables.entries.shape[-1] * pool.block
        self._places = torch.arange(slots, device=device).view(1, 1, -1)

    def mask_bias(self, positions: torch.Tensor) -> torch.Tensor:
        """fp32 [n, 1, W * block]: zero for the tokens up to each row's position, MASK_BIAS
        beyond."""
        return torch.where(self._places <= positions[:, None, None], 0.0, MASK_BIAS)

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask_bias: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """query [n, heads, D], keys and values [blocks, kv heads, block, D] -> [n, heads, D]."""
        return self._mix(self._scores(query, keys), values, mask_bias, scale)

    def attend_latents(
        self,
        query: torch.Tensor,
        turned: torch.Tensor,
        keys: torch.Tensor,
        latents: torch.Tensor,
        mask_bias: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """The same in the latent space, where a score has two parts.

        query [n, heads, rank] with latents [blocks, 1, block, rank], and turned [n, heads, rope] with
        keys [blocks, 1, block, rope] -> [n, heads, rank].
        """
        scores = self._scores(query, latents) + self._scores(turned, keys)
        return self._mix(scores, latents, mask_bias, scale)

    def _scores(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """query [n, heads, D], keys [blocks, kv heads, block, D] -> [n, heads, W * block]."""
        count, heads, dim = query.shape
        queries = query.reshape(-1, dim)
        own_keys = keys[self.own_start : self.pool.num_blocks].flatten(0, 1)
        shared_keys = keys[: self.shared_range].flatten(0, 1)
        scores = torch.cat(
            [
                _product(queries, self.own_queries, own_keys.transpose(1, 2)),
                _product(queries, self.shared_queries, shared_keys.transpose(1, 2)),
                keys.new_zeros(1, self.pool.block),
            ]
        )
        return scores.index_select(0, self.entries).view(count, heads, -1)

    def _mix(
        self, scores: torch.Tensor, values: torch.Tensor, mask_bias: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Softmax and the values: scores [n, heads, W * block] -> [n, heads, D]."""
        count, heads, _ = scores.shape
        dim = values.shape[3]
        weights = torch.add(mask_bias, scores, alpha=scale).softmax(dim=-1)
        weights = weights.to(values.dtype).view(-1, self.pool.block)  # [n * heads * W, block]
        own_values = values[self.own_start : self.pool.num_blocks].flatten(0, 1)
        shared_values = values[: self.shared_range].flatten(0, 1)
        found = torch.cat(
            [
                _product(weights, self.own_weights, own_values),
                _product(weights, self.shared_weights, shared_values),
                values.new_zeros(1, dim),
            ]
        )
        by_entry = found.index_select(0, self.entries).view(count, heads, -1, dim)
        return by_entry.sum(dim=2)

    def _flat(self, table: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(table).reshape(-1)).to(self.device)


def _product(rows: torch.Tensor, chosen: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Multiply the chosen rows [N, x], dealt evenly to B blocks, with blocks [B, x, y] -> [N,
    y]."""
    if not len(chosen):
        return rows.new_empty(0, blocks.shape[2])
    dealt = rows.index_select(0, chosen).view(len(blocks), -1, rows.shape[1])
    return torch.bmm(dealt, blocks).view(-1, blocks.shape[2])
