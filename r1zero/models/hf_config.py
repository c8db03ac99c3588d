"""Values of a Hugging Face config.json, checked one by one, under the defaults of transformers.

Each reader raises KeyError when its key is missing and BadInput when the key cannot have its value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from r1zero.config.parse import LARGEST
from r1zero.errors import BadInput, shown

ROPE_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
}
DEFAULT_ROPE_THETA = 10000.0


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama-3 style stretching of the rotary frequencies (transformers' `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


def architecture(config: Mapping[str, Any]) -> object:
    """The first of `architectures`."""
    found = config.get("architectures")
    if isinstance(found, list) and found:
        return found[0]
    return found


def refuse_others(mapping: Mapping[str, Any], neutral: Mapping[str, object]) -> None:
    """BadInput where a key has another value than the one that changes nothing here."""
    for key, value in neutral.items():
        if mapping.get(key) is not None and mapping[key] != value:
            raise BadInput(f"{key}: {shown(mapping[key])} is not supported; only {shown(value)} is")


def fp8_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale where weights are in fp8 (weights/fp8.py); None where they
    are not. BadInput for any other quantization."""
    given = config.get("quantization_config")
    if given is None:
        return None
    if isinstance(given, dict) and given.get("quant_method") == "fp8":
        match given.get("fmt", "e4m3"), given.get("weight_block_size"):
            case "e4m3", [int(rows), int(columns)] if rows > 0 and columns > 0:
                return rows, columns
    raise BadInput(
        f"quantization_config: {shown(given)} is not supported; only fp8 in e4m3 with blocks is, "
        'such as {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}'
    )


def refuse_partial_attention(config: Mapping[str, Any], layers: int) -> None:
    """BadInput where not every layer attends to all tokens before."""
    if config.get("layer_types") not in (None, ["full_attention"] * layers):
        raise BadInput(
            f"layer_types: {config['layer_types']} is not supported; only full_attention in "
            f"each of the {layers} layers is"
        )


def written(value: object) -> str:
    """A value as config.json has it: a text in quotes."""
    return json.dumps(value, ensure_ascii=False)


def count(config: Mapping[str, Any], key: str) -> int:
    """A whole number of at least 1."""
    value = config[key]
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 1 <= value <= LARGEST:
        raise BadInput(f"{key}: {written(value)} must be a whole number of at least 1")
    return int(value)


def positive(mapping: Mapping[str, Any], key: str) -> float:
    """A finite number above 0."""
    value = mapping[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise BadInput(f"{key}: {written(value)} must be a number above 0")
    return float(value)


def flag(config: Mapping[str, Any], key: str) -> bool:
    """True or false; false when it is missing."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise BadInput(f"{key}: {written(value)} must be true or false")
    return bool(value)


def kv_heads(config: Mapping[str, Any], heads: int, may_be_missing: bool) -> int:
    """Key and value heads: as many as query heads where the key is null or, in some families,
    missing.
    """
    key = "num_key_value_heads"
    if may_be_missing:
        given = config.get(key)
    else:
        given = config[key]
    if given is None:
        number = heads
    else:
        number = count(config, key)
    if heads % number:
        raise BadInput(f"{key}: {number} does not divide num_attention_heads {heads}")
    return number


def head_dim(
    config: Mapping[str, Any], hidden: int, heads: int, if_missing: int | None = None
) -> int:
    """Columns of a head: the hidden size shared out to the heads, unless it is given.

    `if_missing` is a family's own default: it holds where the key is missing, not where it is null.
    """
    if if_missing is not None and "head_dim" not in config:
        return if_missing
    if config.get("head_dim") is not None:
        size = count(config, "head_dim")
    elif hidden % heads:
        raise BadInput(
            f"num_attention_heads: {heads} does not divide hidden_size {hidden}, and there is "
            "no head_dim"
        )
    else:
        size = hidden // heads
    if size % 2:
        raise BadInput(f"head_dim: {size} must be even, since rotary positions turn pairs")
    return size


def rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from the keys of transformers 4 (`rope_theta`) or 5 (`rope_parameters`)."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict) or not set(given) <= ROPE_KEYS:
        raise BadInput(
            f"rope_parameters: {given} is not supported; known are the keys "
            + ", ".join(sorted(ROPE_KEYS))
        )
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise BadInput(f"rope type {kind!r} is not supported; supported are default and llama3")
    refuse_others(given, {"partial_rotary_factor": 1})
    theta = positive({"rope_theta": DEFAULT_ROPE_THETA, **config, **given}, "rope_theta")
    if kind == "default":
        return theta, None
    return theta, _llama3(given)


def _llama3(given: Mapping[str, Any]) -> RopeScaling:
    scaling = RopeScaling(
        factor=positive(given, "factor"),
        low_freq_factor=positive(given, "low_freq_factor"),
        high_freq_factor=positive(given, "high_freq_factor"),
        original_max_positions=count(given, "original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise BadInput(
            f"high_freq_factor: {scaling.high_freq_factor} must be above low_freq_factor "
            f"{scaling.low_freq_factor}"
        )
    return scaling
