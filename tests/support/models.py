"""Tiny random models of each family as Hugging Face folders: the independent reference is
transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=0,
)
# in the keys of transformers 4, which 5 reads, too
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
EXPERTS = dict(
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=48,
    norm_topk_prob=True,
)
YARN = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    beta_fast=32,
    beta_slow=1,
    mscale=1.0,
    mscale_all_dim=1.0,
    original_max_position_embeddings=64,
)
LATENT = dict(
    num_key_value_heads=4,
    q_lora_rank=40,
    kv_lora_rank=32,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=20,
    first_k_dense_replace=1,
    moe_intermediate_size=48,
    routed_scaling_factor=2.5,
    num_mtp_layers=0,
)
FAMILIES = {
    "deepseek_v3": lambda **kw: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SIZES
            | LATENT
            | dict(
                n_routed_experts=16,
                num_experts_per_tok=4,
                n_group=4,
                topk_group=2,
                n_shared_experts=1,
                rope_parameters=YARN,
            )
            | kw
        )
    ),
    "moonlight": lambda **kw: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SIZES
            | LATENT
            | dict(
                q_lora_rank=None,
                n_routed_experts=8,
                num_experts_per_tok=3,
                n_group=1,
                topk_group=1,
                n_shared_experts=2,
                rms_norm_eps=1e-5,
            )
            | kw
        )
    ),
    "qwen2": lambda **kw: Qwen2ForCausalLM(Qwen2Config(**SIZES | kw)),
    "qwen2_tied": lambda **kw: Qwen2ForCausalLM(
        Qwen2Config(**SIZES | dict(tie_word_embeddings=True) | kw)
    ),
    "qwen3": lambda **kw: Qwen3ForCausalLM(
        Qwen3Config(**SIZES | dict(head_dim=24, tie_word_embeddings=True) | kw)
    ),
    "llama": lambda **kw: LlamaForCausalLM(
        LlamaConfig(**SIZES | dict(rope_theta=10000.0, rope_scaling=LLAMA3_ROPE) | kw)
    ),
    "mistral": lambda **kw: MistralForCausalLM(
        MistralConfig(**SIZES | dict(sliding_window=None) | kw)
    ),
    "olmo2": lambda **kw: Olmo2ForCausalLM(Olmo2Config(**SIZES | kw)),
    "qwen3_moe": lambda **kw: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES | EXPERTS | dict(head_dim=24) | kw)
    ),
    "qwen3_moe_mixed": lambda **kw: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES | EXPERTS | dict(head_dim=24, mlp_only_layers=[0, 2]) | kw)
    ),
}


def make_model(family: str, folder: Path, **sizes: object) -> PreTrainedModel:
    """Build a model with random weights, norms and biases included, save it to `folder`, and return
    it in fp32."""
    torch.manual_seed(7)
    model = FAMILIES[family](**sizes).float().eval()
    fill_at_random(model)
    model.save_pretrained(folder)
    model.config._experts_implementation = "eager"  # grouped products are less exact
    return model


@torch.no_grad()
def fill_at_random(model: torch.nn.Module) -> None:
    """Give all weights random values, norms, biases and routers some that show."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
        elif name.endswith(("bias", "mlp.gate.weight")):  # a router's scores lie apart
            parameter.normal_(0, 0.3)
        else:
            parameter.normal_(0, 0.08)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1)


def file_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a model by the names that its files have: transformers 5 has all experts of a layer
    in one."""
    found = {}
    for name, value in tensors.items():
        place, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for expert, gate_up in enumerate(value):
                gate, up = gate_up.chunk(2)
                found[f"{place}.{expert}.gate_proj.weight"] = gate
                found[f"{place}.{expert}.up_proj.weight"] = up
        elif kind == "down_proj":
            for expert, down in enumerate(value):
                found[f"{place}.{expert}.down_proj.weight"] = down
        else:
            found[name] = value
    return found
