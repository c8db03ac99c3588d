"""Qwen3-MoE (Qwen3-30B-A3B, 235B-A22B): Qwen3's block with experts in the place of the MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from r1zero.errors import BadInput, shown
from r1zero.models import hf_config, moe
from r1zero.models.config import Experts, ModelConfig
from r1zero.models.dense import DenseBlock, DenseFamily, gated_mlp
from r1zero.models.family import DecoderBlock, LayerWeights
from r1zero.models.moe_block import MoeMlp
from r1zero.models.params import ParamSpec
from r1zero.models.qwen3 import Qwen3

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import ModuleSpec


class Qwen3Moe(Qwen3):
    """transformers' Qwen3MoeForCausalLM, without sliding windows and without its auxiliary loss."""

    name = "qwen3_moe"
    architectures = ("Qwen3MoeForCausalLM",)
    default_head_dim = None
    checked_arguments = (
        *DenseFamily.checked_arguments,
        "num_experts",
        "moe_router_topk",
        "moe_ffn_hidden_size",
        "moe_router_score_function",
    )

    # -- config.json and Megatron's names ------------------------------------------------------

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """As Qwen3, and its experts. Raises KeyError or BadInput."""
        read = super().read_config(config)
        return replace(read, experts=_read_experts(config, read.num_layers))

    def matches_megatron(self, keys: Mapping[str, Any]) -> bool:
        """Norms of queries and keys, and experts."""
        return bool(keys.get("qk_layernorm")) and bool(keys.get("num_experts"))

    def hf_from_megatron(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of a model in Megatron's names. Raises KeyError or BadInput."""
        hf_config.refuse_others(keys, {"moe_router_score_function": "softmax"})
        # Softmax over the chosen is that over all, renormalised: MindSpeed-LLM may say it so.
        renormalised = bool(keys.get("norm_topk_prob"))
        return super().hf_from_megatron(keys) | {
            "num_experts": keys["num_experts"],
            "num_experts_per_tok": keys["moe_router_topk"],
            "moe_intermediate_size": keys["moe_ffn_hidden_size"],
            "norm_topk_prob": renormalised or not keys.get("moe_router_pre_softmax"),
            "mlp_only_layers": moe.dense_layers(keys),
        }

    def to_megatron(self, config: ModelConfig) -> dict[str, Any]:
        """Say the same in Megatron's names."""
        return super().to_megatron(config) | moe.megatron_arguments(config)

    def in_own_words(self, config: ModelConfig, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Layers with experts are a list unless all are alike; the chosen have the softmax."""
        said = super().in_own_words(config, keys)
        if "moe_layer_freq" in keys:
            said["moe_layer_freq"] = moe.plain_pattern(keys["moe_layer_freq"], config.num_layers)
        if keys.get("norm_topk_prob"):
            said["moe_router_pre_softmax"] = False
        return said

    # -- parameters and sizes ------------------------------------------------------------------

    def mlp_params(self, config: ModelConfig, layer: int) -> list[ParamSpec]:
        """Router and experts, or a dense MLP."""
        if not moe.has_experts(config, layer):
            return gated_mlp(config, layer)
        return moe.moe_params(config, layer)

    def cut_sizes(self, config: ModelConfig) -> dict[str, int]:
        """As of dense models; the MLP's inner size only where there is a dense one."""
        sizes = super().cut_sizes(config)
        if moe.layers_are_alike(config):
            del sizes["ffn_hidden_size"]
        return sizes

    def mlp_elements(
        self, config: ModelConfig, layer: int, tp: int, sequence_parallel: bool
    ) -> float:
        """What experts keep. Each rank sends its own tokens to them, a TP-th under sequence
        parallelism."""
        if not moe.has_experts(config, layer):
            return super().mlp_elements(config, layer, tp, sequence_parallel)
        tokens = 1 / tp if sequence_parallel else 1
        return tokens * moe.activation_elements(config)

    # -- the two engines -----------------------------------------------------------------------

    def transformer_options(self, config: ModelConfig) -> dict[str, Any]:
        """Those of experts: softmax over the chosen (norm_topk_prob)."""
        return moe.transformer_options(config)

    def layer_spec(
        self, config: ModelConfig, layer: int, groups: ProcessGroupCollection
    ) -> ModuleSpec:
        """Qwen3's, with Megatron's router and dispatcher and our experts in the place of the
        MLP."""
        spec = super().layer_spec(config, layer, groups)
        if moe.has_experts(config, layer):
            spec.submodules.mlp = moe.expert_layer(config)
        return spec

    def decoder_block(self, config: ModelConfig, layer: int, weights: LayerWeights) -> DecoderBlock:
        """One layer of the rollout engine."""
        if not moe.has_experts(config, layer):
            return DenseBlock(config, layer, weights)
        return DenseBlock(config, layer, weights, MoeMlp(config, layer, weights))


# -- config.json ---------------------------------------------------------------------------------


def _read_experts(config: Mapping[str, Any], num_layers: int) -> Experts:
    """The experts by config.json. Raises KeyError or BadInput."""
    count = _num_experts(config)
    top_k = hf_config.count(config, "num_experts_per_tok")
    if not 2 <= top_k <= count:
        raise BadInput(
            f"num_experts_per_tok: {top_k} is not supported; 2 to {count}, the experts of a layer, "
            "are"
        )
    if not hf_config.flag(config, "norm_topk_prob"):
        raise BadInput(
            "norm_topk_prob: false, which is its default, is not supported; only true is: weights "
            "of the chosen experts that add up to 1"
        )
    return Experts(
        count=count,
        top_k=top_k,
        ffn_hidden_size=hf_config.count(config, "moe_intermediate_size"),
        layers=_expert_layers(config, num_layers),
    )


def _num_experts(config: Mapping[str, Any]) -> int:
    """`num_experts`; transformers 5 writes `num_local_experts`. Raises KeyError or BadInput."""
    names = [key for key in ("num_experts", "num_local_experts") if key in config]
    if not names:
        raise KeyError("num_experts")
    counts = {moe.num_experts(config, name) for name in names}
    if len(counts) > 1:
        raise BadInput(
            f"num_experts: {config['num_experts']} is not num_local_experts "
            f"{config['num_local_experts']}; leave one of them out"
        )
    return counts.pop()


def _expert_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Layers with experts: every `decoder_sparse_step`th but those in `mlp_only_layers`.

    >>> _expert_layers({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, 6)
    (1, 5)
    """
    step = hf_config.count({"decoder_sparse_step": 1, **config}, "decoder_sparse_step")
    dense = config.get("mlp_only_layers") or []
    known = range(num_layers)
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise BadInput(f"mlp_only_layers: {shown(dense)} must be a list of layer numbers")
    found = tuple(layer for layer in known if (layer + 1) % step == 0 and layer not in dense)
    if not found:
        raise BadInput(
            "decoder_sparse_step and mlp_only_layers leave no layer with experts; a model without "
            "experts is a Qwen3ForCausalLM"
        )
    return found
