"""config.json of Qwen3-MoE: what its experts are, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from r1zero.errors import BadInput
from r1zero.models.config import Experts, ModelConfig
from r1zero.models.family import family_of
from r1zero.models.params import Shards, num_elements, param_table

# As published with Qwen3-30B-A3B, but for keys that say nothing about the network.
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MISSING = object()


def read(**changes: Any) -> ModelConfig:
    content = QWEN3_30B_A3B | changes
    return ModelConfig.from_config(
        {key: value for key, value in content.items() if value is not MISSING}
    )


def test_sizes_of_the_published_model() -> None:
    shape = read()
    assert shape.experts == Experts(
        count=128, top_k=8, ffn_hidden_size=768, layers=tuple(range(48))
    )
    assert round(shape.num_parameters / 1e9, 1) == 30.5
    assert len(param_table(shape)) == 435
    experts = [spec for spec in param_table(shape) if spec.cut == "experts"]
    assert round(sum(num_elements(spec) for spec in experts) / 1e9, 1) == 29.0
    part = Shards(tp=4, ep=8)
    held = sum(num_elements(spec, part) for spec in param_table(shape))
    assert 29.0 / 8 < held / 1e9 < 29.0 / 8 + 1.6 / 4 + 0.1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_experts": MISSING}, "num_experts"),
        ({"num_experts": 0}, "num_experts: 0 must be a whole number of at least 1"),
        ({"num_experts": 257}, "num_experts: 257 is not supported; at most 256 are"),
        ({"num_local_experts": 64}, "num_experts: 128 is not num_local_experts 64"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok: 1 is not supported; 2 to 128"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok: 129 is not supported"),
        ({"moe_intermediate_size": MISSING}, "moe_intermediate_size"),
        ({"norm_topk_prob": False}, "norm_topk_prob: false, which is its default, is not"),
        ({"norm_topk_prob": MISSING}, "norm_topk_prob: false, which is its default, is not"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step: 0 must be a whole number"),
        ({"decoder_sparse_step": 49}, "leave no layer with experts"),
        ({"mlp_only_layers": list(range(48))}, "leave no layer with experts"),
        ({"mlp_only_layers": 3}, "mlp_only_layers: 3 must be a list of layer numbers"),
        ({"mlp_only_layers": [True]}, "must be a list of layer numbers"),
        ({"attention_bias": True}, "attention_bias: true is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window: true is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not"),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises((BadInput, KeyError)) as refused:
        read(**changes)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (0, 1, 2, 3, 4)),
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"mlp_only_layers": [0, 4]}, (1, 2, 3)),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, (3,)),
    ],
)
def test_layers_with_experts_are_those_of_transformers(
    changes: dict[str, Any], layers: tuple[int, ...]
) -> None:
    small = {
        "num_hidden_layers": 5,
        "hidden_size": 16,
        "intermediate_size": 8,
        "moe_intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 16,
    } | changes
    theirs = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**small))
    routed = [hasattr(layer.mlp, "experts") for layer in theirs.model.layers]
    shape = read(**small)
    assert shape.experts is not None and shape.experts.layers == layers
    assert routed == [layer in layers for layer in range(5)]


def test_the_number_of_experts_as_transformers_5_writes_it() -> None:
    assert read(num_experts=MISSING, num_local_experts=128) == read()
    assert read(num_local_experts=128) == read()


@pytest.mark.parametrize("changes", [{}, {"mlp_only_layers": [0, 1]}, {"decoder_sparse_step": 3}])
def test_megatrons_names_tell_the_family_and_the_experts(changes: dict[str, Any]) -> None:
    ours = read(**changes)
    keys = ours.to_megatron()
    assert ModelConfig.from_megatron(keys) == ours
    del keys["hf_model_type"]
    assert ModelConfig.from_megatron(keys) == ours


def test_megatrons_frequency_counts_from_the_first_layer() -> None:
    keys = read().to_megatron() | {"num_layers": 5, "moe_layer_freq": 2}
    assert ModelConfig.from_megatron(keys).experts == Experts(
        count=128, top_k=8, ffn_hidden_size=768, layers=(0, 2, 4)
    )


def test_a_list_of_layers_with_experts_has_one_entry_a_layer() -> None:
    keys = read().to_megatron() | {"moe_layer_freq": [1, 0, 1]}
    with pytest.raises(BadInput, match="is of 3 layers, but num_layers is 48"):
        ModelConfig.from_megatron(keys)


def test_arguments_of_mindspeed_llm_are_read() -> None:
    theirs = {"moe_layer_freq": -1, "moe_router_pre_softmax": True, "norm_topk_prob": True}
    assert ModelConfig.from_megatron(read().to_megatron() | theirs) == read()


@pytest.mark.parametrize(
    ("key", "value"),
    [("moe_router_score_function", "sigmoid"), ("moe_router_pre_softmax", True)],
)
def test_other_routers_of_megatron_are_refused(key: str, value: object) -> None:
    with pytest.raises(BadInput):
        ModelConfig.from_megatron(read().to_megatron() | {key: value})


def test_other_families_do_not_take_megatron_arguments_with_experts() -> None:
    keys = read().to_megatron()
    del keys["hf_model_type"]
    for traits in ({"add_qkv_bias": True, "qk_layernorm": False}, {"qk_layernorm": False}):
        with pytest.raises(BadInput, match="is not supported"):
            ModelConfig.from_megatron(keys | traits)


def test_experts_keep_more_where_sequence_parallelism_does_not_cut_their_tokens() -> None:
    shape = read(num_hidden_layers=2, mlp_only_layers=[0])
    family = family_of(shape)
    dense = family.activation_elements(shape, 0, 4, True)
    cut = family.activation_elements(shape, 1, 4, True)
    whole = family.activation_elements(shape, 1, 4, False)
    copies = 8 * (2048 + 5 * 768) + 4 * 128
    assert cut - dense == copies / 4 - 4 * 6144 / 4
    assert whole - family.activation_elements(shape, 0, 4, False) == copies - 4 * 6144 / 4


def test_tensor_parallelism_need_not_divide_a_dense_mlp_that_is_not_there() -> None:
    assert "ffn_hidden_size" not in family_of(read()).cut_sizes(read())
    mixed = read(mlp_only_layers=[0])
    assert family_of(mixed).cut_sizes(mixed)["ffn_hidden_size"] == 6144
