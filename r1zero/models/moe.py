"""Mixture of experts (Shazeer et al. 2017): the rows of the parameter table, and memory of a layer.

A router gives each token a score for each of E experts; the k best compute it, each a gated MLP:

    chosen = top k of router(x)                     weight = softmax of the scores of the chosen
    h += sum over chosen e of weight[e] * down[e](silu(gate[e](x)) * up[e](x))

DeepSeek-V3 (arXiv:2412.19437, section 2.1.2) chooses otherwise. With s = sigmoid(router(x)) and a bias
of each expert that is not trained:

    chosen = top k of s + bias, out of the groups of experts whose two best add up to the most
    weight = scale * s of the chosen / their sum
    h += shared experts, which compute every token: one gated MLP

The experts of a layer are two tensors, with the experts along the first axis; a rank holds whole
experts, those of its part of that axis.

    Megatron                                            Hugging Face
    mlp.router.weight               [E, H]              mlp.gate.weight
    mlp.experts.linear_fc1.weight   [E, 2 F, H]         mlp.experts.{e}.gate_proj, .up_proj, for each e
    mlp.experts.linear_fc2.weight   [E, H, F]           mlp.experts.{e}.down_proj
    mlp.router.expert_bias          [E], fp32           mlp.gate.e_score_correction_bias
    mlp.shared_experts.linear_fc1.weight  [2 S, H]      mlp.shared_experts.gate_proj, .up_proj
    mlp.shared_experts.linear_fc2.weight  [H, S]        mlp.shared_experts.down_proj
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from r1zero.errors import BadInput, shown
from r1zero.models import hf_config
from r1zero.models.config import Experts, ModelConfig
from r1zero.models.params import ParamSpec, whole_param

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

FC1 = "mlp.experts.linear_fc1.weight"
FC2 = "mlp.experts.linear_fc2.weight"
BIAS = "mlp.router.expert_bias"
MOST_EXPERTS = 256  # of a layer: the recorded choice of a token is one byte an expert


def experts_of(config: ModelConfig) -> Experts:
    """The experts of a model that has some."""
    assert config.experts is not None, f"a model of {config.family} without experts"
    return config.experts


def has_experts(config: ModelConfig, layer: int) -> bool:
    """Whether a layer has experts instead of a dense MLP."""
    return config.experts is not None and layer in config.experts.layers


def layers_are_alike(config: ModelConfig) -> bool:
    """Whether all layers have experts, or none has."""
    return config.experts is None or len(config.experts.layers) == config.num_layers


def num_experts(config: Mapping[str, Any], key: str) -> int:
    """The experts of a layer by this key of config.json. Raises KeyError or BadInput."""
    count = hf_config.count(config, key)
    if count > MOST_EXPERTS:
        raise BadInput(f"{key}: {count} is not supported; at most {MOST_EXPERTS} are")
    return count


# -- rows of the parameter table -------------------------------------------------------------------


def moe_params(config: ModelConfig, layer: int) -> list[ParamSpec]:
    """All of one layer: the router, its experts, and those that are shared."""
    table = [router(config, layer)]
    if experts_of(config).has_bias:
        table.append(router_bias(config, layer))
    table += stacked_experts(config, layer)
    if experts_of(config).shared_ffn_size:
        table += shared_experts(config, layer)
    return table


def router(config: ModelConfig, layer: int) -> ParamSpec:
    """The scores' weights [E, H], whole on every rank."""
    view = (experts_of(config).count, config.hidden_size)
    name = f"decoder.layers.{layer}.mlp.router.weight"
    return whole_param(name, f"model.layers.{layer}.mlp.gate.weight", view, None, layer=layer)


def router_bias(config: ModelConfig, layer: int) -> ParamSpec:
    """What is added to scores to choose by them [E], whole on every rank, and never trained."""
    name = f"decoder.layers.{layer}.{BIAS}"
    hf = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
    return replace(whole_param(name, hf, (experts_of(config).count,), None, layer=layer), fp32=True)


def shared_experts(config: ModelConfig, layer: int) -> list[ParamSpec]:
    """The experts that compute every token, as one MLP: gate and up [2 S, H], and down [H, S]."""
    hidden = config.hidden_size
    ffn = experts_of(config).shared_ffn_size
    place = f"model.layers.{layer}.mlp.shared_experts"
    gate_up = ParamSpec(
        name=f"decoder.layers.{layer}.mlp.shared_experts.linear_fc1.weight",
        hf=(f"{place}.gate_proj.weight", f"{place}.up_proj.weight"),
        hf_shape=((ffn, hidden), (ffn, hidden)),
        view=(2, ffn, hidden),
        axis=1,
        layer=layer,
        place="layer",
    )
    name = f"decoder.layers.{layer}.mlp.shared_experts.linear_fc2.weight"
    down = whole_param(name, f"{place}.down_proj.weight", (hidden, ffn), 1, layer=layer)
    return [gate_up, down]


def stacked_experts(config: ModelConfig, layer: int) -> list[ParamSpec]:
    """All experts of a layer: gate and up [E, 2 F, H], and down [E, H, F]."""
    experts = experts_of(config)
    hidden = config.hidden_size
    ffn = experts.ffn_hidden_size
    gate_up = []
    down = []
    for expert in range(experts.count):
        place = f"model.layers.{layer}.mlp.experts.{expert}"
        gate_up += [f"{place}.gate_proj.weight", f"{place}.up_proj.weight"]
        down.append(f"{place}.down_proj.weight")
    return [
        _stacked(layer, FC1, gate_up, (ffn, hidden), (experts.count, 2, ffn, hidden)),
        _stacked(layer, FC2, down, (hidden, ffn), (experts.count, hidden, ffn)),
    ]


def _stacked(
    layer: int, name: str, hf: list[str], hf_shape: tuple[int, ...], view: tuple[int, ...]
) -> ParamSpec:
    """A tensor of all experts, whose sources are all of one shape."""
    return ParamSpec(
        name=f"decoder.layers.{layer}.{name}",
        hf=tuple(hf),
        hf_shape=(hf_shape,) * len(hf),
        view=view,
        axis=0,
        cut="experts",
        layer=layer,
        place="layer",
    )


def activation_elements(config: ModelConfig) -> float:
    """Elements that experts keep of one token for the backward pass, in elements of 2 bytes.

    Of each of the k copies of a token: the expert's input, H; gate and up, 2 F, silu of gate, its
    product with up, and that times the router's weight, F each. And of the router, in fp32, scores
    and weights of all experts, 4 E.

    Routing is taken to be even: a rank whose experts are chosen twice as often keeps twice as many
    copies.
    """
    experts = experts_of(config)
    copy = config.hidden_size + 5 * experts.ffn_hidden_size
    return experts.top_k * copy + 4 * experts.count


def shared_elements(config: ModelConfig, tp: int) -> float:
    """Elements that the shared experts keep of one token: four products, cut by TP."""
    return 4 * experts_of(config).shared_ffn_size / tp


# -- Megatron's names and modules ------------------------------------------------------------------


def megatron_arguments(config: ModelConfig) -> dict[str, Any]:
    """The experts in the names of Megatron's arguments."""
    experts = experts_of(config)
    keys: dict[str, Any] = {
        "num_experts": experts.count,
        "moe_router_topk": experts.top_k,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_layer_freq": layer_pattern(config),
        "moe_router_score_function": experts.scores,
        "moe_router_pre_softmax": False,
    }
    if experts.has_bias:
        keys |= {"moe_router_enable_expert_bias": True}
        keys |= _grouped_choice(experts)
    if experts.shared_ffn_size:
        keys["moe_shared_expert_intermediate_size"] = experts.shared_ffn_size
    return keys


def transformer_options(config: ModelConfig) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig. The router in fp32, and no balancing: an auxiliary loss,
    or a bias that moves, would work against the reward."""
    experts = experts_of(config)
    options: dict[str, Any] = {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_layer_freq": layer_pattern(config),
        "moe_router_topk": experts.top_k,
        "moe_router_score_function": experts.scores,
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": False,
        "moe_permute_fusion": False,
    }
    if experts.has_bias:
        options |= _grouped_choice(experts)
    if experts.shared_ffn_size:
        options["moe_shared_expert_intermediate_size"] = experts.shared_ffn_size
    return options


def _grouped_choice(experts: Experts) -> dict[str, Any]:
    """How experts are chosen out of groups; Megatron has no group where there is one."""
    one = experts.groups == 1
    return {
        "moe_router_num_groups": None if one else experts.groups,
        "moe_router_group_topk": None if one else experts.top_k_groups,
        "moe_router_topk_scaling_factor": experts.scale,
    }


def layer_pattern(config: ModelConfig) -> int | list[int]:
    """Megatron's moe_layer_freq: 1 where all layers have experts, else a list, 0 for a dense layer.

    Megatron keeps the layers of a checkpoint apart where it is a list: unlike layers cannot be
    stacked.
    """
    if layers_are_alike(config):
        return 1
    return [int(has_experts(config, layer)) for layer in range(config.num_layers)]


def plain_pattern(given: int | list[int], num_layers: int) -> int | list[int]:
    """Any moe_layer_freq as `layer_pattern` says it; see `dense_layers`.

    >>> plain_pattern(-1, 4), plain_pattern(2, 4), plain_pattern([1, 1, 1, 1], 4)
    (1, [1, 0, 1, 0], 1)
    """
    pattern = given
    if isinstance(given, int):
        dense = dense_layers({"num_layers": num_layers, "moe_layer_freq": given})
        pattern = [int(layer not in dense) for layer in range(num_layers)]
    return 1 if pattern == [1] * num_layers else pattern


def dense_layers(keys: Mapping[str, Any]) -> list[int]:
    """The layers without experts by Megatron's moe_layer_freq: a list as above, or N, where the
    layers 0, N, 2 N have experts. In MindSpeed-LLM's arguments -1 is none.

    >>> dense_layers({"num_layers": 5, "moe_layer_freq": 2})
    [1, 3]
    """
    pattern = keys.get("moe_layer_freq", 1)
    if isinstance(pattern, list):
        if len(pattern) != keys["num_layers"]:
            raise BadInput(
                f"moe_layer_freq: {shown(pattern)} is of {len(pattern)} layers, but num_layers is "
                f"{keys['num_layers']}"
            )
        return [layer for layer, has_experts in enumerate(pattern) if not has_experts]
    if pattern == -1:
        return []
    every = hf_config.count({"moe_layer_freq": pattern}, "moe_layer_freq")
    return [layer for layer in range(keys["num_layers"]) if layer % every]


def expert_layer(config: ModelConfig) -> ModuleSpec:
    """megatron-core's layer of experts with ours in it, and our router where the choice has a
    bias."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

    from r1zero.models.stacked_experts import BiasedRouter, StackedExperts

    spec = get_moe_module_spec(use_te=False, num_experts=experts_of(config).count)
    spec.submodules.experts = StackedExperts
    if experts_of(config).has_bias:
        spec.submodules.router = BiasedRouter
    return spec
