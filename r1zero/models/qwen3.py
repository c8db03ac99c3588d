"""Qwen3: the dense block with an RMSNorm of each query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from r1zero.models.dense import NEUTRAL, DenseFamily


class Qwen3(DenseFamily):
    """transformers' Qwen3ForCausalLM, without sliding windows."""

    name = "qwen3"
    architectures = ("Qwen3ForCausalLM",)
    neutral = NEUTRAL | {"attention_bias": False}
    default_head_dim: ClassVar[int | None] = 128  # where config.json does not say it
    qk_norm = True

    def matches_megatron(self, keys: Mapping[str, Any]) -> bool:
        """Norms of queries and keys, and no experts."""
        return bool(keys.get("qk_layernorm")) and not keys.get("num_experts")
