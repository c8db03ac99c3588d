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

from r1zero.models.config import Latent
from r1zero.models.family import Attend, AttendLatent, LocalExperts, UpProjection
from r1zero.ops.rotary import rotate
from r1zero.rollout import sampler
from r1zero.rollout.block_attention import DecodeStep
from r1zero.rollout.experts import multiply_by_experts
from r1zero.rollout.latent import LatentTokens, absorb, values_of_heads


@dataclass(frozen=True, slots=True)
class Heads:
    """This rank's attention heads, and what turns and normalises them."""

    kv_heads: int
    per_group: int  # query heads that share a kv head
    dim: int
    eps: float  # of every RMSNorm
    scale: float  # of scores before the softmax
    cos: torch.Tensor  # [positions, columns that are turned]
    sin: torch.Tensor
    latent: Latent | None = None  # then all share one kv head, and `dim` is that of queries


@dataclass(frozen=True, slots=True)
class RotaryRows:
    """The rows of cos and sin that the tokens of one pass need, shaped as the operators use them."""

    cos: torch.Tensor
    sin: torch.Tensor


class Operators:
    """Norms, activation, attention and sampling of one decoder."""

    # whether a block of the cache lies in memory token by token: see BlockPool
    token_major: ClassVar[bool] = False
    # Whether a decoding step launches the same whatever blocks its rows have: see npu_graphs.py. By
    # products it has other shapes whenever a block comes or goes.
    capturable: bool = False
    # Whether replicas share experts: a rank then has few of those that tokens go to.
    shares_experts: bool = False

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
        scale = self.heads.scale
        found = step.layout.products.attend(query, keys, values, step.mask_bias, scale)
        return found.view(len(qkv), -1)

    def latent_rotary(self, positions: torch.Tensor) -> RotaryRows:
        """The same of latent attention, [T, 1, rope]."""
        at = self.heads
        return RotaryRows(
            at.cos.index_select(0, positions)[:, None], at.sin.index_select(0, positions)[:, None]
        )

    def turn_latent(
        self, query: torch.Tensor, latent: torch.Tensor, key: torch.Tensor, rotary: RotaryRows
    ) -> LatentTokens:
        """Part the queries of this rank's heads, and turn them and the key: see AttendLatent."""
        return LatentTokens.turned_by(self.latent, query, latent, key, rotary.cos, rotary.sin)

    def decoding_latent(self, step: DecodeStep) -> AttendLatent:
        """The same of latent attention, in the latent space (latent.py)."""
        return partial(self._attend_latent, step, self.latent_rotary(step.positions))

    def _attend_latent(
        self,
        step: DecodeStep,
        rotary: RotaryRows,
        layer: int,
        query: torch.Tensor,
        latent: torch.Tensor,
        key: torch.Tensor,
        up: UpProjection,
    ) -> torch.Tensor:
        """Attend in one layer: see AttendLatent."""
        tokens = self.turn_latent(query, latent, key, rotary)
        self._write_latents(step, layer, tokens)
        found = self._attend_to_latents(step, layer, absorb(tokens.query, up), tokens.turned)
        return values_of_heads(found, up, self.latent.value_dim)

    @property
    def latent(self) -> Latent:
        """The sizes of latent attention."""
        assert self.heads.latent is not None, "a model without latent attention"
        return self.heads.latent

    def _write_latents(self, step: DecodeStep, layer: int, tokens: LatentTokens) -> None:
        """Write the new tokens into the cache."""
        pool = step.layout.pool
        pool.keys[layer][step.block, :, step.offset] = tokens.key
        pool.values[layer][step.block, :, step.offset] = tokens.latent

    def _attend_to_latents(
        self, step: DecodeStep, layer: int, query: torch.Tensor, turned: torch.Tensor
    ) -> torch.Tensor:
        """query [n, heads, rank] and turned [n, heads, rope] -> mixed latents [n, heads, rank]."""
        pool = step.layout.pool
        return step.layout.products.attend_latents(
            query, turned, pool.keys[layer], pool.values[layer], step.mask_bias, self.heads.scale
        )

    def sample(
        self,
        logits: torch.Tensor,
        uniform: torch.Tensor,
        sampling: sampler.Sampling,
        group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one token a row: see sampler.sample."""
        return sampler.sample(logits, uniform, sampling, group)
