"""config.json and tokenizer of a model folder: what is not computed here is refused, never
miscomputed."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version
from support.small_config import MODEL, SHAPE, load, only, tokenizer_json, write
from tokenizers import Tokenizer, models

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig, RopeScaling
from r1zero.preflight.checks import check

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN3, LLAMA = {"architectures": ["Qwen3ForCausalLM"]}, {"architectures": ["LlamaForCausalLM"]}
MISTRAL = {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 8192}
OLMO2 = {"architectures": ["Olmo2ForCausalLM"]}
MISSING = object()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"architectures": None},
            "architecture None is not supported; supported are Qwen2ForCausalLM",
        ),
        ({"architectures": 3}, "architecture 3 is not supported"),
        (
            {"architectures": ["MixtralForCausalLM"]},
            "architecture 'MixtralForCausalLM' is not supported",
        ),
        ({"num_hidden_layers": "4"}, 'num_hidden_layers: "4" must be a whole number of at least 1'),
        ({"num_hidden_layers": 4.0}, "num_hidden_layers: 4.0 must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers: true must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0 must be a whole number of at least 1"),
        ({"vocab_size": -1}, "vocab_size: -1 must be"),
        ({"hidden_size": None}, "hidden_size: null must be"),
        ({"intermediate_size": [48]}, "intermediate_size: [48] must be"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings: 1000"),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads: 3 does not divide num_attention_heads 4",
        ),
        ({"num_key_value_heads": MISSING}, "lacks the key 'num_key_value_heads'"),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 3},
            "num_attention_heads: 3 does not divide hidden_size",
        ),
        ({"head_dim": 5}, "head_dim: 5 must be even"),
        ({"rms_norm_eps": "1e-6"}, 'rms_norm_eps: "1e-6" must be a number above 0'),
        ({"rms_norm_eps": 0}, "rms_norm_eps: 0 must be a number above 0"),
        ({"rms_norm_eps": MISSING}, "lacks the key 'rms_norm_eps'"),
        ({"tie_word_embeddings": "no"}, 'tie_word_embeddings: "no" must be true or false'),
        ({"use_sliding_window": True}, "use_sliding_window: true is not supported; only false is"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "only full_attention in each of the 4 layers",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config: {'quant_method': 'fp8'} is not supported; only fp8 in e4m3 with",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "weight_block_size": [128, 128]}},
            "quantization_config: {'quant_method': 'gptq'",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0]}},
            "only fp8 in e4m3 with blocks is",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "fp8",
                    "fmt": "e5m2",
                    "weight_block_size": [128, 128],
                }
            },
            "only fp8 in e4m3 with blocks is",
        ),
        ({"hidden_act": "gelu"}, "hidden_act: gelu is not supported; only silu is"),
        (LLAMA | {"attention_bias": True}, "attention_bias: true is not supported"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias: true is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported; only 1 is"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor: 0.5 is not supported",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            "rope type 'linear' is not supported",
        ),
        ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "full_attention"),
        ({"rope_scaling": "llama3"}, "rope_parameters: llama3 is not supported"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "lacks the key 'factor'"),
        ({"rope_scaling": LLAMA3 | {"factor": "8"}}, 'factor: "8" must be a number above 0'),
        (
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            "1.0 must be above low_freq_factor 1.0",
        ),
        (
            MISTRAL,
            (
                "sliding_window: 4096 is not supported, since it is shorter than "
                "max_position_embeddings 8192"
            ),
        ),
        (MISTRAL | {"sliding_window": 8191}, "sliding_window: 8191 is not supported"),
        (MISTRAL | {"sliding_window": "no"}, 'sliding_window: "no" must be a whole number'),
        (MISTRAL | {"num_key_value_heads": MISSING}, "lacks the key 'num_key_value_heads'"),
        (OLMO2 | {"attention_bias": True}, "attention_bias: true is not supported"),
        (
            OLMO2 | {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope type 'yarn' is not supported",
        ),
        ({"rope_theta": 0}, "rope_theta: 0 must be a number above 0"),
        ({"rope_theta": float("nan")}, "rope_theta: NaN must be a number above 0"),
    ],
)
def test_config_json_that_is_not_computed_here_is_refused(
    home: Path, changes: dict[str, Any], sentence: str
) -> None:
    content = {key: value for key, value in (SHAPE | changes).items() if value is not MISSING}
    (home / "net" / "config.json").write_text(json.dumps(content))
    problem = only(check(load(home)))
    assert (
        problem.startswith(f"actor_rollout.load: {home}/net/config.json") and sentence in problem
    ), problem


@pytest.mark.parametrize("content", ["", "[1]", "3", '{"a": ', "\ufeff{}", "[" * 5000, "\udcff"])
def test_config_json_that_is_no_json_is_refused(home: Path, content: str) -> None:
    (home / "net" / "config.json").write_text(content, errors="surrogateescape")
    assert f"{home}/net/config.json" in only(check(load(home)))


KINDS = [
    transformers.Qwen2Config,
    transformers.Qwen3Config,
    transformers.LlamaConfig,
    transformers.MistralConfig,
    transformers.Olmo2Config,
]
FIVE = Version(transformers.__version__).major >= 5
NO_GROUPS: dict[str, Any] = {"num_key_value_heads": None}
GIVEN = [
    {},
    {"rope_theta": 1e6},
    {"rope_scaling": LLAMA3, "rope_theta": 1e6},
    {"head_dim": 32},
    {"tie_word_embeddings": True},
    NO_GROUPS,
]
if FIVE:  # 4 does not look into these
    GIVEN += [
        {"rope_scaling": LLAMA3 | {"rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    ]


def takes(kind: type, given: dict[str, Any]) -> bool:
    """Does the configuration of this transformers take what is given?"""
    if kind is transformers.MistralConfig and given == NO_GROUPS:
        return False
    return FIVE or kind is not transformers.Olmo2Config or "rope_scaling" not in given


COMPARED = [(kind, given) for kind, given in product(KINDS, GIVEN) if takes(kind, given)]


def rotary_of(theirs: transformers.PretrainedConfig) -> tuple[float, str]:
    """Base and kind of the rotary positions, which transformers 4 and 5 keep under other names."""
    if FIVE:
        return theirs.rope_parameters["rope_theta"], theirs.rope_parameters["rope_type"]
    scaling = getattr(theirs, "rope_scaling", None) or {"rope_type": "default"}
    return theirs.rope_theta, scaling["rope_type"]


@pytest.mark.parametrize(("kind", "given"), COMPARED)
def test_defaults_are_those_of_transformers(kind: type, given: dict[str, Any]) -> None:
    small = {
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "intermediate_size": 8,
        "num_attention_heads": 32,
        "vocab_size": 16,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    } | given
    theirs = kind(**json.loads(json.dumps(small)))
    if kind is transformers.MistralConfig:
        small |= {"sliding_window": None}
    if kind not in (transformers.LlamaConfig, transformers.Olmo2Config):
        small = {"num_key_value_heads": theirs.num_key_value_heads} | small
    ours = ModelConfig.from_config(
        small | {"architectures": [kind.__name__.replace("Config", "ForCausalLM")]}
    )
    theta, rope_type = rotary_of(theirs)
    assert ours.num_kv_heads == theirs.num_key_value_heads and ours.rope_theta == theta
    assert (
        ours.head_dim == (getattr(theirs, "head_dim", None) or 256 // 32)
        and ours.tie_word_embeddings == theirs.tie_word_embeddings
    )
    stretched = RopeScaling(8.0, 1.0, 4.0, 8192) if rope_type == "llama3" else None
    assert ours.rope_scaling == stretched


@pytest.mark.parametrize(
    "changes", [MISTRAL | {"sliding_window": None}, MISTRAL | {"sliding_window": 8192}, OLMO2]
)
def test_megatrons_names_tell_the_family_and_the_sizes(changes: dict[str, Any]) -> None:
    ours = ModelConfig.from_config(SHAPE | changes)
    assert ModelConfig.from_megatron(ours.to_megatron()) == ours


def test_a_family_that_is_not_known_is_refused_in_megatrons_names() -> None:
    keys = ModelConfig.from_config(SHAPE | OLMO2).to_megatron()
    assert keys["hf_model_type"] == "olmo2"
    with pytest.raises(
        BadInput, match="hf_model_type: olmo9 is not supported; supported are qwen2, qwen3"
    ):
        ModelConfig.from_megatron(keys | {"hf_model_type": "olmo9"})


def test_model_file_that_cannot_stand_in_for_the_folder_is_refused(home: Path) -> None:
    whole = MODEL | {"ffn_hidden_size": 48, "num_query_groups": 2, "max_position_embeddings": 256}
    for key, value in (
        ("num_attention_heads", 0),
        ("num_query_groups", 3),
        ("norm_epsilon", -1),
        ("kv_channels", 5),
    ):
        write(home / "model", "small", json.dumps({"small": whole | {key: value}}))
        problems = check(load(home, "actor_rollout.load=/nowhere"), absent_ok=True)
        assert only(problems).startswith("model small: "), problems


# -- tokenizer and end of text ---


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("tokenizer.json", '{"model": ', "tokenizer.json cannot be read as a JSON file"),
        (
            "tokenizer_config.json",
            "not JSON",
            "tokenizer_config.json cannot be read as a JSON file",
        ),
        ("tokenizer_config.json", "[]", "tokenizer_config.json must hold a JSON object"),
        (
            "tokenizer.json",
            '{"model": {"vocab": {"a": 0}}}',
            "tokenizer.json is no tokenizer that the library tokenizers",
        ),
        (
            "tokenizer.json",
            Tokenizer(models.WordLevel({"a": 0, "b": 128}, unk_token="a")).to_str(),
            "up to 128, but the model's embedding has 128",
        ),
        (
            "tokenizer.json",
            Tokenizer(models.Unigram([(f"{n}", 0.0) for n in range(129)], 0)).to_str(),
            "has ids up to 128",
        ),
        ("tokenizer.json", tokenizer_json(*map(chr, range(1000, 1031))), "has ids up to 128"),
        (
            "generation_config.json",
            '{"eos_token_id": [3, 128]}',
            "eos_token_id: [3, 128] must be ids below",
        ),
        (
            "generation_config.json",
            '{"eos_token_id": "</s>"}',
            "eos_token_id: </s> must be an id or a list of ids",
        ),
        ("generation_config.json", "[", "generation_config.json cannot be read as a JSON file"),
    ],
)
def test_tokenizer_that_does_not_fit_the_model_is_refused(
    home: Path, name: str, content: str, sentence: str
) -> None:
    (home / "net" / name).write_text(content)
    assert sentence in only(check(load(home)))


def test_tokenizer_as_large_as_the_embedding_is_accepted(home: Path) -> None:
    (home / "net" / "tokenizer.json").write_text(tokenizer_json(*map(chr, range(1000, 1030))))
    (home / "net" / "generation_config.json").write_text('{"eos_token_id": [127, 0]}')
    assert check(load(home)) == []
