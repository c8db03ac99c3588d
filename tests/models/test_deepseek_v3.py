"""The config.json of DeepSeek-V3 and its like: sizes, Megatron's names, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.family import family_of
from r1zero.models.rotary import rotary_tables

# As published with DeepSeek-V3, without its keys for training.
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
# What differs in Moonlight-16B-A3B.
MOONLIGHT = DEEPSEEK_V3 | {
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "quantization_config": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}


@pytest.mark.parametrize(
    ("config", "billions", "active"),
    [(DEEPSEEK_V3, 671.0, 37.6), (MOONLIGHT, 16.0, 2.8)],
    ids=["DeepSeek-V3", "Moonlight"],
)
def test_sizes_are_those_that_are_published(config, billions, active):
    """Moonlight's report counts 2.24 B active ones without embeddings, which are 0.67 B."""
    read = ModelConfig.from_config(config)
    assert read.num_parameters == pytest.approx(billions * 1e9, rel=0.005)
    assert read.num_active_parameters == pytest.approx(active * 1e9, rel=0.05)


def test_the_cache_has_a_latent_and_a_shared_key_of_each_token():
    read = ModelConfig.from_config(DEEPSEEK_V3)
    for tp in (1, 8):
        assert family_of(read).kv_cache_elements(read, tp) == 61 * (512 + 64)


@pytest.mark.parametrize("config", [DEEPSEEK_V3, MOONLIGHT], ids=["DeepSeek-V3", "Moonlight"])
def test_megatrons_names_say_the_same(config):
    read = ModelConfig.from_config(config)
    keys = read.to_megatron()
    assert ModelConfig.from_megatron(keys) == replace(read, further_layers=0)


def test_yarn_is_that_of_transformers():
    config = DEEPSEEK_V3 | {"max_position_embeddings": 512}
    theirs = DeepseekV3RotaryEmbedding(DeepseekV3Config(**config))
    positions = torch.arange(512)[None]
    cos, sin = theirs(torch.zeros(1), positions)
    ours = rotary_tables(ModelConfig.from_config(config), 512, torch.device("cpu"))
    torch.testing.assert_close(ours[0], cos[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(ours[1], sin[0], rtol=0, atol=2e-6)


def test_yarn_sharpens_scores():
    """The factor 40 and mscale_all_dim 1: (0.1 ln 40 + 1) squared."""
    read = ModelConfig.from_config(DEEPSEEK_V3)
    assert read.attention_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    plain = ModelConfig.from_config(MOONLIGHT)
    assert plain.attention_scale == pytest.approx(192**-0.5)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"scoring_func": "softmax"}, "scoring_func: softmax is not supported"),
        ({"topk_method": "greedy"}, "topk_method: greedy is not supported"),
        ({"norm_topk_prob": False}, "norm_topk_prob: false is not supported"),
        ({"num_key_value_heads": 8}, "num_key_value_heads: 8 is not supported"),
        ({"topk_group": 2}, "topk_group: 2 is not supported with num_experts_per_tok 8"),
        ({"n_group": 7}, "n_group: 7 does not deal n_routed_experts 256 evenly"),
        ({"n_group": 3, "n_routed_experts": 255, "topk_group": 4}, "topk_group: 4 is more than"),
        ({"first_k_dense_replace": 61}, "first_k_dense_replace: 61 must be 0 to 60"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim: 63 must be even"),
        ({"n_routed_experts": 512}, "n_routed_experts: 512 is not supported; at most 256"),
        ({"rope_interleave": False}, "rope_interleave: false is not supported"),
        (
            {"rope_scaling": {**DEEPSEEK_V3["rope_scaling"], "mscale_all_dim": 0, "mscale": 0.7}},
            "mscale: 0.7 is not supported",
        ),
        (
            {"rope_scaling": {**DEEPSEEK_V3["rope_scaling"], "beta_fast": 1}},
            "beta_fast: 1 must be above beta_slow 1",
        ),
    ],
)
def test_what_is_not_computed_exactly_is_refused(keys, sentence):
    with pytest.raises(BadInput) as refusal:
        ModelConfig.from_config(DEEPSEEK_V3 | keys)
    assert sentence in str(refusal.value)
