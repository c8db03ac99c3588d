"""Large models and layouts to plan publishing for, by name; nothing is loaded, no device asked.

The Qwen2.5 lists are the program's own. The last is like DeepSeek-V3's, with 64 layers, so that 16
stages share them evenly, and every expert a matrix pair of its own that TP cuts: a list that the
program cannot train, to see what a plan costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from r1zero.distributed.placement import RankGrid
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
EXPERT_LAYERS = 64


@dataclass(frozen=True, slots=True)
class PlanCase:
    """A model, and the ranks that publish it: train TP, PP, and rollout TP."""

    tensors: Callable[[], list[ParamSpec]]
    num_layers: int
    train_ranks: int
    train_tp: int
    train_pp: int
    rollout_ranks: int
    rollout_tp: int

    @property
    def train(self) -> RankGrid:
        return RankGrid.of("train", 0, self.train_ranks, self.train_tp, self.train_pp)

    @property
    def rollout(self) -> RankGrid:
        return RankGrid.of("rollout", self.train_ranks, self.rollout_ranks, self.rollout_tp)


def dense(config: dict[str, Any]) -> Callable[[], list[ParamSpec]]:
    """What makes the list of a model that the program knows."""
    return lambda: param_table(ModelConfig.from_config(config))


def with_experts(experts: int = 256) -> list[ParamSpec]:
    """A list like DeepSeek-V3's: latent attention, and in each layer a router, a shared expert and
    so many others."""
    hidden = 7168
    tensors = [whole_param(EMBEDDING, "embed", (129280, hidden), 0, place="first")]
    for layer in range(EXPERT_LAYERS):

        def add(name: str, view: tuple[int, ...], axis: int | None, layer: int = layer) -> None:
            full = f"decoder.layers.{layer}.{name}"
            tensors.append(whole_param(full, full, view, axis, layer=layer))

        add("input_layernorm.weight", (hidden,), None)
        add("self_attention.linear_q_down_proj.weight", (1536, hidden), None)
        add("self_attention.q_layernorm.weight", (1536,), None)
        add("self_attention.linear_q_up_proj.weight", (128 * 192, 1536), 0)
        add("self_attention.linear_kv_down_proj.weight", (576, hidden), None)
        add("self_attention.kv_layernorm.weight", (512,), None)
        add("self_attention.linear_kv_up_proj.weight", (128 * 256, 512), 0)
        add("self_attention.linear_proj.weight", (hidden, 128 * 128), 1)
        add("pre_mlp_layernorm.weight", (hidden,), None)
        add("mlp.router.weight", (experts, hidden), None)
        for expert in ["shared_experts", *(f"experts.{number}" for number in range(experts))]:
            add(f"mlp.{expert}.linear_fc1.weight", (2, 2048, hidden), 1)
            add(f"mlp.{expert}.linear_fc2.weight", (hidden, 2048), 1)
    tensors.append(
        whole_param("decoder.final_layernorm.weight", "norm", (hidden,), None, place="last")
    )
    tensors.append(whole_param(OUTPUT_LAYER, "head", (129280, hidden), 0, place="last"))
    return tensors


CASES = {
    "7B, 8 TP2PP4 -> 6 TP2": PlanCase(dense(QWEN25_7B), 28, 8, 2, 4, 6, 2),
    "7B, 256 TP2PP4 -> 128 TP2": PlanCase(dense(QWEN25_7B), 28, 256, 2, 4, 128, 2),
    "7B, 256 TP4PP2 -> 1024 TP2": PlanCase(dense(QWEN25_7B), 28, 256, 4, 2, 1024, 2),
    "32B, 256 TP8PP4 -> 256 TP4": PlanCase(dense(QWEN25_32B), 64, 256, 8, 4, 256, 4),
    "32B, 1024 TP8PP4 -> 1024 TP4": PlanCase(dense(QWEN25_32B), 64, 1024, 8, 4, 1024, 4),
    "72B, 256 TP8PP8 -> 512 TP8": PlanCase(dense(QWEN25_72B), 80, 256, 8, 8, 512, 8),
    "72B, 2048 TP8PP8 -> 4096 TP8": PlanCase(dense(QWEN25_72B), 80, 2048, 8, 8, 4096, 8),
    "16 experts, 256 TP8PP16 -> 512 TP32": PlanCase(
        lambda: with_experts(16), EXPERT_LAYERS, 256, 8, 16, 512, 32
    ),
    "256 experts, 256 TP8PP16 -> 512 TP32": PlanCase(
        with_experts, EXPERT_LAYERS, 256, 8, 16, 512, 32
    ),
}
