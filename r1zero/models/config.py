"""The shape of a model: what placement, memory, weights and both engines need to know of it.

Read from the `config.json` of a Hugging Face folder, so there is one source of truth; needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1zero.errors import BadInput
from r1zero.errors import shown
from r1zero.config.parse import LARGEST, read_json

FAMILIES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}
ARCHITECTURES = {family: architecture for architecture, family in FAMILIES.items()}
QWEN3_HEAD_DIM = 128  # where config.json does not say it
# Keys that would change what is computed, with the one value that does not.
NEUTRAL: dict[str, object] = {
    "hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False, "partial_rotary_factor": 1,
    "quantization_config": None}
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor",
             "high_freq_factor", "original_max_position_embeddings"}


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
        """Read `config.json` in `folder`. BadInput when it is missing or not a supported model."""
        path = Path(folder) / "config.json"
        if not path.exists():
            raise BadInput(f"{path} does not exist: `load` must name a Hugging Face model folder "
                           "with config.json and safetensors files")
        config = read_json(path)
        if not isinstance(config, dict):
            raise BadInput(f"{path} must hold a JSON object")
        try:
            return cls.from_config(config)
        except KeyError as error:
            raise BadInput(f"{path} lacks the key {error}: is it a model's config.json?") from None
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None

    @classmethod
    def from_config(cls, config: dict) -> ModelShape:
        """Build from the content of a config.json. Raises KeyError or BadInput."""
        family = FAMILIES[_architecture(config)]
        _refuse_others(config, NEUTRAL if family == "qwen2" else NEUTRAL | {"attention_bias": False})
        layers, hidden, heads = (_count(config, key) for key in (
            "num_hidden_layers", "hidden_size", "num_attention_heads"))
        if config.get("layer_types") not in (None, ["full_attention"] * layers):
            raise BadInput(f"layer_types: {config['layer_types']} is not supported; only full_attention in "
                           f"each of the {layers} layers is")
        theta, scaling = _rope(config)
        return cls(
            family=family,
            num_layers=layers,
            hidden_size=hidden,
            ffn_size=_count(config, "intermediate_size"),
            num_heads=heads,
            num_kv_heads=_kv_heads(config, family, heads),
            head_dim=_head_dim(config, family, hidden, heads),
            vocab_size=_count(config, "vocab_size"),
            max_positions=_count(config, "max_position_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=_positive(config, "rms_norm_eps"),
            tied=_flag(config, "tie_word_embeddings"),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
        )

    @classmethod
    def from_megatron(cls, keys: Mapping[str, Any]) -> ModelShape:
        """Read Megatron's names, of a model file's or a checkpoint's. Raises KeyError or BadInput."""
        family = "qwen3" if keys.get("qk_layernorm") else "qwen2" if keys.get("add_qkv_bias") else "llama"
        grouped = keys.get("group_query_attention", True)  # else num_query_groups does not count
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


# Each reads from a config.json. KeyError when a key is missing, BadInput when it cannot have its value.


def _architecture(config: dict) -> str:
    found = config.get("architectures")
    name = found[0] if isinstance(found, list) and found else found
    if not isinstance(name, str) or name not in FAMILIES:
        raise BadInput(f"architecture {name!r} is not supported; supported are {', '.join(FAMILIES)}")
    return name


def _refuse_others(mapping: dict, neutral: Mapping[str, object]) -> None:
    for key, value in neutral.items():
        if mapping.get(key) is not None and mapping[key] != value:
            raise BadInput(f"{key}: {shown(mapping[key])} is not supported; only {shown(value)} is")


def _count(config: dict, key: str) -> int:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
        raise BadInput(f"{key}: {shown(value)} must be a whole number of at least 1")
    return value


def _positive(mapping: dict, key: str) -> float:
    value = mapping[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise BadInput(f"{key}: {shown(value)} must be a number above 0")
    return float(value)


def _flag(config: dict, key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise BadInput(f"{key}: {shown(value)} must be true or false")
    return bool(value)


def _kv_heads(config: dict, family: str, heads: int) -> int:
    """As many as heads where it is null, and in llama also where it is missing."""
    given = config.get("num_key_value_heads") if family == "llama" else config["num_key_value_heads"]
    kv_heads = heads if given is None else _count(config, "num_key_value_heads")
    if heads % kv_heads:
        raise BadInput(f"num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}")
    return kv_heads


def _head_dim(config: dict, family: str, hidden: int, heads: int) -> int:
    if family == "qwen3" and "head_dim" not in config:
        return QWEN3_HEAD_DIM
    if config.get("head_dim") is None and hidden % heads:
        raise BadInput(f"num_attention_heads: {heads} does not divide hidden_size {hidden}, and there is "
                       "no head_dim")
    head_dim = hidden // heads if config.get("head_dim") is None else _count(config, "head_dim")
    if head_dim % 2:
        raise BadInput(f"head_dim: {head_dim} must be even, since rotary positions turn pairs")
    return head_dim


def _rope(config: dict) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from the keys of transformers 4 (`rope_theta`) or 5 (`rope_parameters`)."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or not set(rope) <= ROPE_KEYS:
        raise BadInput(f"rope_parameters: {rope} is not supported; known are the keys "
                       + ", ".join(sorted(ROPE_KEYS)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise BadInput(f"rope type {kind!r} is not supported; supported are default and llama3")
    _refuse_others(rope, {"partial_rotary_factor": 1})
    theta = _positive({"rope_theta": 10000.0} | config | rope, "rope_theta")
    if kind == "default":
        return theta, None
    factors = (_positive(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    scaling = RopeScaling(*factors, _count(rope, "original_max_position_embeddings"))
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise BadInput(f"high_freq_factor: {scaling.high_freq_factor} must be above low_freq_factor "
                       f"{scaling.low_freq_factor}")
    return theta, scaling
