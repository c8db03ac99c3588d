"""Mixture of experts (Shazeer et al. 2017): the rows of the parameter table, and memory of a layer.

A router gives each token a score for each of E experts; the k best compute it, each a gated MLP:

    chosen = top k of router(x)                     weight = softmax of the scores of the chosen
    h += sum over chosen e of weight[e] * down[e](silu(gate[e](x)) * up[e](x))

The experts of a layer are two tensors, with the experts along the first axis; a rank holds whole
experts, those of its part of that axis.

    Megatron                                            Hugging Face
    mlp.router.weight               [E, H]              mlp.gate.weight
    mlp.experts.linear_fc1.weight   [E, 2 F, H]         mlp.experts.{e}.gate_proj, .up_proj, for each e
    mlp.experts.linear_fc2.weight   [E, H, F]           mlp.experts.{e}.down_proj
"""

from __future__ import annotations

from r1zero.models.config import Experts, ModelConfig
from r1zero.models.params import ParamSpec, whole_param

FC1 = "mlp.experts.linear_fc1.weight"
FC2 = "mlp.experts.linear_fc2.weight"
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


def router(config: ModelConfig, layer: int) -> ParamSpec:
    """The scores' weights [E, H], whole on every rank."""
    view = (experts_of(config).count, config.hidden_size)
    name = f"decoder.layers.{layer}.mlp.router.weight"
    return whole_param(name, f"model.layers.{layer}.mlp.gate.weight", view, None, layer=layer)


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
