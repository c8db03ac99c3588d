"""The shape of a model: what placement, memory, weights and both engines need to know of it.

Read from the `config.json` of a Hugging Face folder, so there is one source of truth; needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}
ARCHITECTURES = {family: architecture for architecture, family in FAMILIES.items()}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama-3 style stretching of the rotary frequencies (transformers' `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder with grouped-query attention, rotary positions, RMSNorm and a gated MLP."""

    family: str  # "qwen2" (and 2.5), "qwen3" or "llama"
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # rows of the embedding, padding included
    max_positions: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    tied: bool  # the output layer is the embedding
    qkv_bias: bool
    qk_norm: bool

    @property
    def qkv_size(self) -> int:
        """Rows of the fused projection: for each kv head its query heads, its key, its value."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_parameters(self) -> int:
        layer = self.hidden_size * (self.qkv_size + self.num_heads * self.head_dim + 3 * self.ffn_size)
        layer += 2 * self.hidden_size + self.qkv_bias * self.qkv_size + self.qk_norm * 2 * self.head_dim
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelShape:
        """Read `config.json` in `folder`. ValueError when it is missing or not a supported model."""
        path = Path(folder) / "config.json"
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist: `load` must name a Hugging Face model folder "
                             "with config.json and safetensors files") from None
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} cannot be read as JSON: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path} must hold a JSON object")
        try:
            return cls.from_config(config)
        except KeyError as error:
            raise ValueError(f"{path} lacks the key {error}: is it a model's config.json?") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_config(cls, config: dict) -> ModelShape:
        """Build from the content of a config.json. Raises KeyError or ValueError."""
        architecture = (config.get("architectures") or [None])[0]
        if architecture not in FAMILIES:
            raise ValueError(f"architecture {architecture!r} is not supported; supported are {', '.join(FAMILIES)}")
        family = FAMILIES[architecture]
        if config.get("use_sliding_window"):
            raise ValueError("use_sliding_window: true is not supported; set it to false for full attention")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported; only silu is")
        for key in ("mlp_bias", *(["attention_bias"] if family != "qwen2" else [])):
            if config.get(key):
                raise ValueError(f"{key}: true is not supported for {architecture}")
        theta, scaling = _rope(config)
        return cls(
            family=family,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_size=config["intermediate_size"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=config["rms_norm_eps"],
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
        )

    @classmethod
    def from_megatron(cls, keys: Mapping[str, Any]) -> ModelShape:
        """Read Megatron's names, of a model file or of a checkpoint's arguments. KeyError when one is missing."""
        family = "qwen3" if keys.get("qk_layernorm") else "qwen2" if keys.get("add_qkv_bias") else "llama"
        grouped = keys.get("group_query_attention", True)  # else num_query_groups is a default that does not hold
        return cls.from_config({
            "architectures": [ARCHITECTURES[family]],
            "num_hidden_layers": keys["num_layers"],
            "hidden_size": keys["hidden_size"],
            "intermediate_size": keys["ffn_hidden_size"],
            "num_attention_heads": keys["num_attention_heads"],
            "num_key_value_heads": keys.get("num_query_groups") if grouped else None,
            "head_dim": keys.get("kv_channels"),
            "vocab_size": keys["padded_vocab_size"],
            "max_position_embeddings": keys["max_position_embeddings"],
            "rope_theta": keys.get("rotary_base", 10000.0),
            "rms_norm_eps": keys.get("norm_epsilon", 1e-6),
            "tie_word_embeddings": not keys.get("untie_embeddings_and_output_weights", False),
        })

    def to_megatron(self) -> dict[str, Any]:
        """Say the same in Megatron's names."""
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_size,
            "num_attention_heads": self.num_heads,
            "num_query_groups": self.num_kv_heads,
            "kv_channels": self.head_dim,
            "padded_vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
            "norm_epsilon": self.norm_eps,
            "rotary_base": self.rope_theta,
            "untie_embeddings_and_output_weights": not self.tied,
            "add_qkv_bias": self.qkv_bias,
            "qk_layernorm": self.qk_norm,
        }


def _rope(config: dict) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from the keys of transformers 4 (`rope_theta`) or 5 (`rope_parameters`)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope type {kind!r} is not supported; supported are default and llama3")
    return theta, RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(rope["original_max_position_embeddings"]),
    )
