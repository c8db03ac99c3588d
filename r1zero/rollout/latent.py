"""Latent attention around the cache, which has of each token a latent and one key with its position.

With the parts K [nope, rank] and V [value, rank] of a head's up-projection, its key without a position
is K latent and its value V latent. Prompts make them (`expand`). A decoding step does not, for

    query . (K latent) = (K^T query) . latent         `absorb`
    sum_t p_t (V latent_t) = V (sum_t p_t latent_t)   `values_of_heads`

so that it reads the latents themselves, once for all heads (DeepSeek-V2, arXiv:2405.04434, section
2.1.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from r1zero.models.config import Latent
from r1zero.models.family import UpProjection
from r1zero.ops.rotary import pairs_to_halves, rotate_packed


@dataclass(frozen=True, slots=True)
class LatentTokens:
    """The tokens of one pass in one layer, turned by their positions."""

    query: torch.Tensor  # [T, heads, nope]
    turned: torch.Tensor  # [T, heads, rope], the other part of queries
    latent: torch.Tensor  # [T, 1, rank]
    key: torch.Tensor  # [T, 1, rope]

    @classmethod
    def turned_by(
        cls,
        sizes: Latent,
        query: torch.Tensor,
        latent: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> LatentTokens:
        """Part and turn what an AttendLatent is given, by cos and sin [T, 1, rope]."""
        by_head = query.view(len(query), -1, sizes.query_dim)
        nope, rope = by_head.split([sizes.nope_dim, sizes.rope_dim], dim=-1)
        return cls(
            query=nope,
            turned=rotate_packed(pairs_to_halves(rope), cos, sin),
            latent=latent[:, None],
            key=rotate_packed(pairs_to_halves(key)[:, None], cos, sin),
        )

    def whole_query(self) -> torch.Tensor:
        """Both parts, [T, heads, nope + rope]."""
        return torch.cat([self.query, self.turned], dim=-1)


def expand(
    latent: torch.Tensor, key: torch.Tensor, up: UpProjection, sizes: Latent
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [T, heads, nope + rope] and values [T, heads, value] of latents [T, 1, rank] and keys
    [T, 1, rope]."""
    parts = [sizes.nope_dim, sizes.value_dim]
    made = up(latent[:, 0]).view(len(latent), -1, sum(parts))
    nope, value = made.split(parts, dim=-1)
    rope = key.expand(-1, made.shape[1], -1)
    return torch.cat([nope, rope], dim=-1), value


def absorb(query: torch.Tensor, up: UpProjection) -> torch.Tensor:
    """Take queries [T, heads, nope] to the latent space, [T, heads, rank]."""
    _, heads, nope_dim = query.shape
    of_keys = _by_head(up, heads)[:, :nope_dim]
    return torch.bmm(query.transpose(0, 1), of_keys).transpose(0, 1)


def values_of_heads(mixed: torch.Tensor, up: UpProjection, value_dim: int) -> torch.Tensor:
    """Take mixed latents [T, heads, rank] back: [T, heads * value]."""
    tokens, heads, _ = mixed.shape
    of_values = _by_head(up, heads)[:, -value_dim:]
    found = torch.bmm(mixed.transpose(0, 1), of_values.transpose(1, 2))
    return found.transpose(0, 1).reshape(tokens, -1)


def _by_head(up: UpProjection, heads: int) -> torch.Tensor:
    """Its weight, [heads, nope + value, rank]: for each head the rows of keys, then of values."""
    return up.weight.view(heads, -1, up.weight.shape[1])
