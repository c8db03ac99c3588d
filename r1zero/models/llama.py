"""Llama 2 and 3, and what is built like them (SmolLM2): the dense block as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from r1zero.models.dense import NEUTRAL, DenseFamily


class Llama(DenseFamily):
    """transformers' LlamaForCausalLM, with default rotary frequencies or those of Llama 3."""

    name = "llama"
    architectures = ("LlamaForCausalLM",)
    neutral = NEUTRAL | {"attention_bias": False}
    kv_heads_may_be_missing = True

    def matches_megatron(self, keys: Mapping[str, Any]) -> bool:
        """Neither biases nor norms of queries and keys nor experts."""
        others = ("add_qkv_bias", "qk_layernorm", "num_experts")
        return not any(keys.get(key) for key in others)
