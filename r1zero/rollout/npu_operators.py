"""Operators of the decoder by fused kernels of torch_npu (Ascend NPU).

A dense layer is eleven launches: add and norm, qkv, RoPE of the queries, RoPE of the keys, cache
write, attention, output, add and norm, gate and up, SwiGLU, down. Experts take the place of the last
three with a sort, two grouped products and PyTorch's operators around them.

Latent attention decodes by one fused operator, too, where that takes its sizes: latents of 512
columns, keys of 64, up to 128 heads a rank, as DeepSeek-V3 and Moonlight have them. With other sizes,
which small models for tests have, PyTorch's operators attend to latents, and no step is captured
as a graph.

Checked against torch_npu's published contract, not yet run on hardware.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F

from r1zero.models.family import Attend, AttendLatent, LocalExperts, UpProjection
from r1zero.ops import npu
from r1zero.rollout.block_attention import DecodeStep
from r1zero.rollout.latent import absorb, values_of_heads
from r1zero.rollout.npu_graphs import SIZES
from r1zero.rollout.operators import Heads, Operators, RotaryRows

# Up to so many tokens, those of the largest captured step, the host does not wait to learn how many
# of their copies go to this rank's experts: it lets all of them be multiplied. Where replicas share
# experts no step is captured, and nearly all copies go elsewhere.
FEW_TOKENS = SIZES[-1]


class NpuOperators(Operators):
    """One kernel for each; what has no method here is PyTorch's."""

    token_major: ClassVar[bool] = True  # as npu_scatter_pa_kv_cache writes

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        # Keys and values are one tensor [2, T, kv heads, D] (see `split_qkv_rope`), so the tables
        # are two: the keys', and one that turns by nothing.
        self._cos = torch.stack([heads.cos, torch.ones_like(heads.cos)])
        self._sin = torch.stack([heads.sin, torch.zeros_like(heads.sin)])
        latent = heads.latent
        self._fuses_latents = latent is not None and npu.takes_latents(
            latent.rank, latent.rope_dim, heads.per_group
        )
        self.capturable = latent is None or self._fuses_latents

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Operators.add_norm; the sum is a new tensor."""
        if delta is None:
            return npu.rms_norm(hidden, weight, self.heads.eps), hidden
        return npu.add_rms_norm(hidden, delta, weight, self.heads.eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """As Operators.silu_mul."""
        return npu.swiglu(gate_up)

    def experts(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        experts: LocalExperts,
    ) -> torch.Tensor:
        """As Operators.experts.

        A grouped product wants groups that add up to its rows. So of many tokens those rows are cut
        off that go to other ranks; of few they count to the last expert, and what it makes of them
        is left out of the sum.
        """
        held = len(experts.gate_up)
        if held == 1:  # the grouped product takes two groups at least
            return self._single_expert(x, ids, weights, experts)
        first = experts.first
        rows, places, counts = npu.sort_by_expert(x, ids.int(), first, first + held, experts.total)
        elsewhere = places < 0
        scales = _in_sorted_order(weights, places, elsewhere)
        if held < experts.total:
            if len(x) > FEW_TOKENS or self.shares_experts:
                own = int(counts.sum())
                rows = rows[:own]
                scales = scales[:own]
            else:
                counts[-1].add_(len(rows) - counts.sum())
        if not len(rows):
            return torch.zeros_like(x)
        gate_up = npu.grouped_matmul(rows, experts.gate_up.transpose(1, 2), counts)
        hidden = (self.silu_mul(gate_up) * scales[:, None]).to(x.dtype)
        found = npu.grouped_matmul(hidden, experts.down.transpose(1, 2), counts)
        copies = found.index_select(0, places.clamp(min=0)).masked_fill(elsewhere[:, None], 0)
        # npu_moe_token_unpermute adds up, too, but has no word for copies without a place
        return copies.view(*ids.shape, -1).sum(dim=1)

    def _single_expert(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        experts: LocalExperts,
    ) -> torch.Tensor:
        """As `experts`, of a rank that holds one: it computes all tokens, and those that go elsewhere
        count nothing. So the host need not wait for their number."""
        scales = weights.masked_fill(ids != experts.first, 0).sum(dim=1, keepdim=True)
        hidden = self.silu_mul(F.linear(x, experts.gate_up[0]))
        return F.linear((hidden * scales).to(x.dtype), experts.down[0])

    def rotary(self, positions: torch.Tensor) -> RotaryRows:
        """Rows for keys and values, [2, T, 1, D]."""
        return RotaryRows(
            self._cos.index_select(1, positions)[:, :, None],
            self._sin.index_select(1, positions)[:, :, None],
        )

    def split_qkv_rope(
        self,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        rotary: RotaryRows,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As Operators.split_qkv_rope; the three are contiguous, as cache and attention need them.

        A value goes through RoPE with its key and is turned by nothing: that costs no launch, and a
        copy would.
        """
        at = self.heads
        x = qkv.view(len(qkv), at.kv_heads, at.per_group + 2, at.dim)
        query = x[:, :, : at.per_group]
        pair = x[:, :, at.per_group :].permute(2, 0, 1, 3)  # [2, T, kv heads, D]
        if q_norm is not None:
            assert k_norm is not None, "both or none"
            query = npu.rms_norm(query, q_norm, at.eps)
            pair = torch.stack([npu.rms_norm(pair[0], k_norm, at.eps), pair[1]])
        query = npu.rotary_mul(query, rotary.cos[0][:, None], rotary.sin[0][:, None])
        key, value = npu.rotary_mul(pair, rotary.cos, rotary.sin)
        return query.view(len(qkv), -1, at.dim), key, value

    def decoding(self, step: DecodeStep) -> Attend:
        """As Operators.decoding."""
        return partial(self._attend_by_slots, step, _slots(step), self.rotary(step.positions))

    def _attend_by_slots(
        self,
        step: DecodeStep,
        slots: torch.Tensor,
        rotary: RotaryRows,
        layer: int,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend in one layer: see Attend. Token i of the step goes to slots[i] of the cache."""
        query, key, value = self.split_qkv_rope(qkv, q_norm, k_norm, rotary)
        # as they lie in memory: [blocks, block, kv heads, D]
        keys = step.layout.pool.keys[layer].transpose(1, 2)
        values = step.layout.pool.values[layer].transpose(1, 2)
        npu.write_cache(key, value, keys, values, slots)
        return npu.paged_attention(query, keys, values, step.layout.table, step.lengths)

    def decoding_latent(self, step: DecodeStep) -> AttendLatent:
        """As Operators.decoding_latent."""
        if not self._fuses_latents:
            return super().decoding_latent(step)
        rotary = self.latent_rotary(step.positions)
        return partial(self._attend_latent_by_slots, step, _slots(step), rotary)

    def _attend_latent_by_slots(
        self,
        step: DecodeStep,
        slots: torch.Tensor,
        rotary: RotaryRows,
        layer: int,
        query: torch.Tensor,
        latent: torch.Tensor,
        key: torch.Tensor,
        up: UpProjection,
    ) -> torch.Tensor:
        """Attend in one layer: see AttendLatent. Token i of the step goes to slots[i] of the cache."""
        tokens = self.turn_latent(query, latent, key, rotary)
        # as they lie in memory: [blocks, block, 1, columns]
        keys = step.layout.pool.keys[layer].transpose(1, 2)
        latents = step.layout.pool.values[layer].transpose(1, 2)
        npu.write_cache(tokens.key, tokens.latent, keys, latents, slots)
        mixed = npu.paged_latent_attention(
            absorb(tokens.query, up),
            tokens.turned,
            latents,
            keys,
            step.layout.table,
            step.lengths,
            self.heads.scale,
        )
        return values_of_heads(mixed, up, self.latent.value_dim)


def _slots(step: DecodeStep) -> torch.Tensor:
    """Where in the cache the new token of each row goes, int64 [n]."""
    return torch.add(step.offset, step.block, alpha=step.layout.pool.block)


def _in_sorted_order(
    weights: torch.Tensor, places: torch.Tensor, elsewhere: torch.Tensor
) -> torch.Tensor:
    """Lay the weights [T, k] of copies to their places among the sorted rows, [T * k].

    Copies that go elsewhere have no place, and go to one behind all: with places 1 -1 0 of three
    copies, whose weights are a b c, that is c a - and behind them b.
    """
    copies = len(places)
    at = places.masked_fill(elsewhere, copies).long()
    return weights.new_zeros(copies + 1).index_copy_(0, at, weights.flatten())[:copies]
