"""Models of known shape for tools that count and plan: nothing is loaded, no folder needed.

The lists of tensors of Qwen2.5 and Qwen3-MoE are the program's own. DeepSeek-V3's is written down here, for its family
is not among those that can be trained: to see what such a list would cost.
"""

from __future__ import annotations

from typing import Any

from r1zero.models.config import ModelConfig
from r1zero.models.params import EMBEDDING, OUTPUT_LAYER, ParamSpec, param_table, whole_param

QWEN25: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
QWEN25_7B = QWEN25 | {
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
QWEN25_32B = QWEN25 | {
    "num_hidden_layers": 64,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
}
QWEN25_72B = QWEN25 | {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
QWEN3_30B_A3B = QWEN3_MOE | {
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
}
QWEN3_235B_A22B = QWEN3_MOE | {
    "num_hidden_layers": 94,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
}


def tensors_of(config: dict[str, Any]) -> list[ParamSpec]:
    """The tensors of a model that the program knows, by its config.json."""
    return param_table(ModelConfig.from_config(config))


# Of DeepSeek-V3 (arXiv:2412.19437).
LAYERS = 64  # it has 61; so many that 16 stages share them evenly
DENSE_LAYERS = 3  # the first ones
HIDDEN = 7168
VOCABULARY = 129280
HEADS = 128
DENSE_FFN = 18432
EXPERT_FFN = 2048


def deepseek_v3(experts: int = 256, dense_layers: int = DENSE_LAYERS) -> list[ParamSpec]:
    """The tensors of DeepSeek-V3 with three layers more, in Megatron's names.

    Every expert is a matrix pair of its own that TP cuts: no expert parallelism.
    """
    vocabulary = (VOCABULARY, HIDDEN)
    tensors = [_tensor(EMBEDDING, vocabulary, 0, place="first")]
    for layer in range(LAYERS):
        tensors += _attention(layer)
        if layer < dense_layers:
            tensors += _mlp(layer, "mlp", DENSE_FFN)
        else:
            tensors += _experts(layer, experts)
    tensors.append(_tensor("decoder.final_layernorm.weight", (HIDDEN,), None, place="last"))
    tensors.append(_tensor(OUTPUT_LAYER, vocabulary, 0, place="last"))
    return tensors


def _attention(layer: int) -> list[ParamSpec]:
    """Multi-head latent attention, and the norms of a layer."""
    inner = "self_attention.linear"
    shapes: dict[str, tuple[tuple[int, ...], int | None]] = {
        "input_layernorm.weight": ((HIDDEN,), None),
        f"{inner}_q_down_proj.weight": ((1536, HIDDEN), None),
        "self_attention.q_layernorm.weight": ((1536,), None),
        f"{inner}_q_up_proj.weight": ((HEADS * 192, 1536), 0),
        f"{inner}_kv_down_proj.weight": ((512 + 64, HIDDEN), None),
        "self_attention.kv_layernorm.weight": ((512,), None),
        f"{inner}_kv_up_proj.weight": ((HEADS * 256, 512), 0),
        f"{inner}_proj.weight": ((HIDDEN, HEADS * 128), 1),
        "pre_mlp_layernorm.weight": ((HIDDEN,), None),
    }
    return [_of_layer(layer, name, view, axis) for name, (view, axis) in shapes.items()]


def _experts(layer: int, experts: int) -> list[ParamSpec]:
    """Router, shared expert and routed experts of a layer."""
    tensors = [
        _of_layer(layer, "mlp.router.weight", (experts, HIDDEN), None),
        _of_layer(layer, "mlp.router.expert_bias", (experts,), None),
        *_mlp(layer, "mlp.shared_experts", EXPERT_FFN),
    ]
    for expert in range(experts):
        tensors += _mlp(layer, f"mlp.experts.local_experts.{expert}", EXPERT_FFN)
    return tensors


def _mlp(layer: int, name: str, ffn: int) -> list[ParamSpec]:
    """A gated MLP: gate and up as one, and down."""
    return [
        _of_layer(layer, f"{name}.linear_fc1.weight", (2, ffn, HIDDEN), 1),
        _of_layer(layer, f"{name}.linear_fc2.weight", (HIDDEN, ffn), 1),
    ]


def _of_layer(layer: int, name: str, view: tuple[int, ...], axis: int | None) -> ParamSpec:
    return _tensor(f"decoder.layers.{layer}.{name}", view, axis, layer=layer)


def _tensor(
    name: str,
    view: tuple[int, ...],
    axis: int | None,
    place: str = "layer",
    layer: int | None = None,
) -> ParamSpec:
    return whole_param(name, name, view, axis, place=place, layer=layer)
