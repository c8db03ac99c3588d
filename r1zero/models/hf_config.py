"""Values of a Hugging Face config.json, checked one by one, under the defaults of transformers.

Each reader raises KeyError when its key is missing and BadInput when the key cannot have its value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
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
YARN_KEYS = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
# Layers that predict further tokens (MTP); transformers 5 has the second one.
FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
DEFAULT_ROPE_THETA = 10000.0


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama-3 style stretching of the rotary frequencies (transformers' `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071, sections 3.2 to 3.4), as DeepSeek-V3 has it: columns that turn slowly
    are stretched, and scores are sharpened for it."""

    factor: float
    beta_fast: float  # turns over the original positions from which on a column stays as it is
    beta_slow: float  # up to which it is divided by `factor`
    mscale: float
    mscale_all_dim: float
    original_max_positions: int

    @property
    def table_scale(self) -> float:
        """Of cosine and sine."""
        return self._attention(self.mscale) / self._attention(self.mscale_all_dim)

    @property
    def score_scale(self) -> float:
        """Of attention scores, on top of head_dim ** -0.5."""
        return self._attention(self.mscale_all_dim) ** 2

    def _attention(self, mscale: float) -> float:
        """The paper's sqrt(1 / t), eq. 22, times `mscale` in its logarithm."""
        if self.factor <= 1:
            return 1.0
        return 0.1 * mscale * math.log(self.factor) + 1.0


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


def finite(mapping: Mapping[str, Any], key: str) -> float:
    """A finite number."""
    value = mapping[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise BadInput(f"{key}: {written(value)} must be a number")
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


def rope(
    config: Mapping[str, Any], kinds: Sequence[str] = ("default", "llama3")
) -> tuple[float, RopeScaling | YarnScaling | None]:
    """Base and scaling, from the keys of transformers 4 (`rope_theta`) or 5 (`rope_parameters`), of
    one of these kinds."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    known = ROPE_KEYS | YARN_KEYS if "yarn" in kinds else ROPE_KEYS
    if not isinstance(given, dict) or not set(given) <= known:
        raise BadInput(
            f"rope_parameters: {given} is not supported; known are the keys "
            + ", ".join(sorted(known))
        )
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in kinds:
        raise BadInput(f"rope type {kind!r} is not supported; supported are {' and '.join(kinds)}")
    refuse_others(given, {"partial_rotary_factor": 1})
    theta = positive({"rope_theta": DEFAULT_ROPE_THETA, **config, **given}, "rope_theta")
    if kind == "default":
        return theta, None
    if kind == "yarn":
        return theta, _yarn(given)
    return theta, _llama3(given)


def _yarn(given: Mapping[str, Any]) -> YarnScaling:
    """With transformers' defaults: without mscale_all_dim the tables are scaled, and scores are not."""
    given = {"beta_fast": 32, "beta_slow": 1, **given}
    mscale = 1.0
    mscale_all_dim = 0.0
    if given.get("mscale_all_dim"):
        mscale = positive(given, "mscale")
        mscale_all_dim = positive(given, "mscale_all_dim")
    else:
        refuse_others(given, {"mscale": 1})
    scaling = YarnScaling(
        factor=positive(given, "factor"),
        beta_fast=positive(given, "beta_fast"),
        beta_slow=positive(given, "beta_slow"),
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
        original_max_positions=count(given, "original_max_position_embeddings"),
    )
    if scaling.beta_fast <= scaling.beta_slow:
        raise BadInput(
            f"beta_fast: {scaling.beta_fast:g} must be above beta_slow {scaling.beta_slow:g}"
        )
    return scaling


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
