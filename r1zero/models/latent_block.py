"""The block of latent attention in the rollout engine (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    query = up_q(norm(down_q(x)))                     or one product of x, without a rank of queries
    latent, key = down_kv(x)                          the key is one for all heads, with the position
    h += proj(attention(query, norm(latent), key))    keys and values of the heads: up_kv(latent)

The products down and both norms are whole on each TP rank, those up are cut by heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1zero.models.config import LATENT_NORM_EPS, Latent, ModelConfig
from r1zero.models.dense import GatedMlp, Mlp
from r1zero.models.family import ForwardPass, LayerWeights

if TYPE_CHECKING:
    import torch


class LatentQuery:
    """The product that makes queries, x [T, H] -> [T, heads * (nope + rope)]."""

    def __init__(self, latent: Latent, weights: LayerWeights) -> None:
        self.down = None
        if latent.query_latent is None:
            self.up = weights.linear("self_attention.linear_q_proj")
            return
        self.down = weights.linear("self_attention.linear_q_down_proj")
        self.norm = weights.tensor("self_attention.q_layernorm.weight")
        self.up = weights.linear("self_attention.linear_q_up_proj")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        if self.down is not None:
            x = _normed(self.down(x), self.norm)
        return self.up(x)


class LatentBlock:
    """A block with latent attention, tensor parallel with one all-reduce for each half."""

    def __init__(
        self, config: ModelConfig, layer: int, weights: LayerWeights, mlp: Mlp | None = None
    ) -> None:
        """`mlp` takes the place of the gated MLP."""
        assert config.latent is not None
        self.layer = layer
        self.parts = [config.latent.rank, config.latent.rope_dim]
        self.input_norm = weights.tensor("input_layernorm.weight")
        self.query = LatentQuery(config.latent, weights)
        self.kv_down = weights.linear("self_attention.linear_kv_down_proj")
        self.kv_norm = weights.tensor("self_attention.kv_layernorm.weight")
        self.kv_up = weights.up_projection("self_attention.linear_kv_up_proj")
        self.proj = weights.linear("self_attention.linear_proj")
        self.mlp_norm = weights.tensor("pre_mlp_layernorm.weight")
        self.mlp = mlp or GatedMlp(weights)

    def __call__(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, run: ForwardPass
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Leave the MLP's output [T, H] to be added by what follows."""
        x, hidden = run.operators.add_norm(hidden, delta, self.input_norm)
        latent, key = self.kv_down(x).split(self.parts, dim=-1)
        latent = _normed(latent, self.kv_norm)
        mixed = run.attend_latent(self.layer, self.query(x), latent, key, self.kv_up)
        delta = run.all_reduce(self.proj(mixed))
        x, hidden = run.operators.add_norm(hidden, delta, self.mlp_norm)
        return hidden, run.all_reduce(self.mlp(x, run))


def _normed(latent: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm of latents, with their own epsilon."""
    from r1zero.ops.norm import rms_norm

    return rms_norm(latent, weight, LATENT_NORM_EPS)
