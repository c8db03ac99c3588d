"""Qwen2 and Qwen2.5: the dense block with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from r1zero.models.dense import DenseFamily


class Qwen2(DenseFamily):
    """transformers' Qwen2ForCausalLM, without sliding windows."""

    name = "qwen2"
    architectures = ("Qwen2ForCausalLM",)
    qkv_bias = True

    def matches_megatron(self, keys: Mapping[str, Any]) -> bool:
        """Biases, no norms of queries and keys, and no experts."""
        others = keys.get("qk_layernorm") or keys.get("num_experts")
        return bool(keys.get("add_qkv_bias")) and not others
