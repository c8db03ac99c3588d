"""Operators of the decoder (RMSNorm, RoPE, SwiGLU, attention) by PyTorch on any device.

`native.py` does the same on a CPU in one pass over the data each, `npu_operators.py` by fused kernels
of NPUs; these are their reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F

from r1zero.models.family import Attend, LocalExperts
from r1zero.ops.rotary import rotate
from r1zero.rollout import sampler
from r1zero.rollout.block_attention import DecodeStep
from r1zero.rollout.experts import multiply_by_experts


@dataclass(frozen=True, slots=True)
class Heads:
    """This rank's attention heads, and what turns and normalises them."""

    kv_heads: int
    per_group: int  # query heads that share a kv head
    dim: int
    eps: float  # of every RMSNorm
    cos: torch.Tensor  # [positions, dim]
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class RotaryRows:
    """The rows of cos and sin that the tokens of one pass need, shaped as the operators use them."""

    cos: torch.Tensor
    sin: torch.Tensor


class Operators:
    """Norms, activation, attention and sampling of one decoder."""

    # whether a block of the cache lies in memory token by token: see BlockPool
    token_major: ClassVar[bool] = False

    def __init__(self, heads: Heads) -> None:
        self.heads = heads

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add `delta` to `hidden` [T, H], if there is one: the RMSNorm of the sum, and the sum."""
        if delta is not None:
            hidden += delta
        return F.rms_norm(hidden, hidden.shape[-1:], weight, self.heads.eps), hidden

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """SwiGLU: [T, 2 F] -> silu(first half) * second half, [T, F]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def experts(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        experts: LocalExperts,
    ) -> torch.Tensor:
        """What this rank's experts add to each token: see experts.py."""
        return multiply_by_experts(x, ids, weights, experts, self.silu_mul)

    def rotary(self, positions: torch.Tensor) -> RotaryRows:
        """Fetch the rows of cos and sin for tokens at `positions` [T], once for all layers."""
        at = self.heads
        return RotaryRows(at.cos[positions][:, None, None], at.sin[positions][:, None, None])

    def split_qkv_rope(
        self,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        rotary: RotaryRows,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Part the product [T, kv heads * (per group + 2) * D]; normalise and turn queries and
        keys.

        Returns queries [T, heads, D], keys and values [T, kv heads, D].
        """
        at = self.heads
        x = qkv.view(len(qkv), at.kv_heads, at.per_group + 2, at.dim)
        turning = x[:, :, :-1]
        value = x[:, :, -1]
        if q_norm is not None:
            turning = torch.cat(
                [
                    F.rms_norm(turning[:, :, :-1], (at.dim,), q_norm, at.eps),
                    F.rms_norm(turning[:, :, -1:], (at.dim,), k_norm, at.eps),
                ],
                dim=2,
            )
        turned = rotate(turning, rotary.cos, rotary.sin)
        return turned[:, :, :-1].reshape(len(qkv), -1, at.dim), turned[:, :, -1], value

    def decoding(self, step: DecodeStep) -> Attend:
        """RoPE, cache and attention of one decoding step, for all its layers.

        In each layer it writes the new token's keys and values of every row into the cache, and
        attends to them and all before.
        """
        return partial(self._attend, step, self.rotary(step.positions))

    def _attend(
        self,
        step: DecodeStep,
        rotary: RotaryRows,
        layer: int,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend in one layer: see Attend."""
        query, key, value = self.split_qkv_rope(qkv, q_norm, k_norm, rotary)
        keys = step.layout.pool.keys[layer]
        values = step.layout.pool.values[layer]
        keys[step.block, :, step.offset] = key
        values[step.block, :, step.offset] = value
        return step.layout.products.attend(query, keys, values, step.mask_bias)

    def sample(
        self,
        logits: torch.Tensor,
        uniform: torch.Tensor,
        sampling: sampler.Sampling,
        group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one token a row: see sampler.sample."""
        return sampler.sample(logits, uniform, sampling, group)
