"""Mistral 7B: Llama's block. Its sliding window is not computed, so it must not hide any token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from r1zero.errors import BadInput
from r1zero.models import hf_config
from r1zero.models.config import ModelConfig
from r1zero.models.dense import NEUTRAL, DenseFamily

DEFAULT_WINDOW = 4096  # of transformers, where config.json does not say it; null is none


class Mistral(DenseFamily):
    """transformers' MistralForCausalLM, as of version 0.2 and later, which have no sliding
    window."""

    name = "mistral"
    architectures = ("MistralForCausalLM",)
    neutral = NEUTRAL | {"attention_bias": False}

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """As all dense models. BadInput for a window shorter than the longest sequence."""
        read = super().read_config(config)
        window = _window(config)
        if window is not None and window < read.max_positions:
            raise BadInput(
                f"sliding_window: {window} is not supported, since it is shorter than "
                f"max_position_embeddings {read.max_positions}; for sequences of at most {window} "
                f"tokens set max_position_embeddings to {window}, which computes the same"
            )
        return read

    def hf_from_megatron(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Megatron's keys have no window."""
        return super().hf_from_megatron(keys) | {"sliding_window": None}


def _window(config: Mapping[str, Any]) -> int | None:
    """Tokens that a token attends to, itself included; None is all before it."""
    if "sliding_window" not in config:
        return DEFAULT_WINDOW
    if config["sliding_window"] is None:
        return None
    return hf_config.count(config, "sliding_window")
