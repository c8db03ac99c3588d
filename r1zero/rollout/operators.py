"""Operators of the decoder (RMSNorm, RoPE, SwiGLU, attention) by PyTorch on any device.

`native.py` does the same on a CPU in one pass over the data each, `npu_operators.py` by fused kernels
of NPUs; these are their reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from r1zero.models.rotary import rotate
from r1zero.rollout import sampler
from r1zero.rollout.block_attention import DecodeStep


@dataclass(frozen=True, slots=True)
class Heads:
    """This rank's attention heads, and what turns and normalises them."""

    kv_heads: int
    per_group: int  # query heads that share a kv head
    dim: int
    eps: float  # of every RMSNorm
    cos: torch.Tensor  # [positions, dim]
    sin: torch.Tensor


class Operators:
    """Norms, activation, attention and sampling of one decoder."""

    def __init__(self, heads: Heads) -> None:
        self.heads = heads

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor:
        """Add `delta` to `hidden` [T, H] in place, if there is one, and return the RMSNorm of the
        sum."""
        if delta is not None:
            hidden += delta
        return F.rms_norm(hidden, hidden.shape[-1:], weight, self.heads.eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """SwiGLU: [T, 2 F] -> silu(first half) * second half, [T, F]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def split_qkv_rope(
        self,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        positions: torch.Tensor,
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
        turned = rotate(turning, at.cos[positions][:, None, None], at.sin[positions][:, None, None])
        return turned[:, :, :-1].reshape(len(qkv), -1, at.dim), turned[:, :, -1], value

    def attend(
        self,
        step: DecodeStep,
        layer: int,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> torch.Tensor:
        """Write the new token's keys and values of every row into the cache and attend: -> [n,
        heads * D]."""
        query, keys, values = self.write_cache(step, layer, qkv, q_norm, k_norm)
        return step.layout.products.attend(query, keys, values, step.mask_bias)

    def write_cache(
        self,
        step: DecodeStep,
        layer: int,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Write the new tokens' keys and values into this layer's cache.

        Returns queries [n, heads, D] and the cache's keys and values [blocks, kv heads, block, D].
        """
        query, key, value = self.split_qkv_rope(qkv, q_norm, k_norm, step.positions)
        keys = step.layout.pool.keys[layer]
        values = step.layout.pool.values[layer]
        keys[step.block, :, step.offset] = key
        values[step.block, :, step.offset] = value
        return query, keys, values

    def sample(
        self,
        logits: torch.Tensor,
        uniform: torch.Tensor,
        sampling: sampler.Sampling,
        group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one token a row: see sampler.sample."""
        return sampler.sample(logits, uniform, sampling, group)
