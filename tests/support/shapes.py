"""Shapes of small models, for the parts that are built from a shape alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from r1zero.models.config import ModelConfig

QWEN2 = ModelConfig(
    family="qwen2",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=128,
    max_positions=64,
    rope_theta=1e4,
    rope_scaling=None,
    norm_eps=1e-6,
    tie_word_embeddings=True,
    qkv_bias=True,
    qk_norm=False,
)


def small_shape(**sizes: Any) -> ModelConfig:
    """Two layers of a small Qwen2; `sizes` are those of its fields that are another's."""
    return replace(QWEN2, **sizes)
