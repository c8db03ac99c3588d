"""ParamSpec and the parameter table: what each weight is called, where it lives and how TP cuts it.

    Megatron (local spec, layers numbered globally)       Hugging Face              cut by TP
    embedding.word_embeddings.weight          [V, H]      embed_tokens              rows
    decoder.layers.N.
      input_layernorm.weight                  [H]         input_layernorm           -
      self_attention.linear_qkv.weight        [Q + 2K, H] q_proj, k_proj, v_proj    rows
      self_attention.linear_qkv.bias          [Q + 2K]    their biases (qwen2)      rows
      self_attention.{q,k}_layernorm.weight   [head]      {q,k}_norm (qwen3)        -
      self_attention.linear_proj.weight       [H, Q]      o_proj                    columns
      pre_mlp_layernorm.weight                [H]         post_attention_layernorm  -
      mlp.linear_fc1.weight                   [2 F, H]    gate_proj, up_proj        each's rows
      mlp.linear_fc2.weight                   [H, F]      down_proj                 columns
    decoder.final_layernorm.weight            [H]         norm                      -
    output_layer.weight                       [V, H]      lm_head (untied only)     rows

Axes: V vocabulary, H hidden, F feed-forward, Q query rows, K key (and value) rows, all global. The
rows of linear_qkv run by key-value group: the group's query heads, its key head, its value head.
That is a dense model (dense.py); a family lists its own.

Loading, saving and publishing read nothing but this table. It needs neither Megatron nor torch: a
rank's weights are a plain dict from these names to tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from r1zero.errors import BadInput
from r1zero.models.family import family_of

if TYPE_CHECKING:
    import torch

    from r1zero.models.config import ModelConfig

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamSpec:
    """One parameter of the whole model.

    `view` is the global tensor shaped so that tensor parallelism cuts one axis of it: linear_fc1 is
    (2, F, H) cut along axis 1, all others are as the table above says.
    """

    name: str  # Megatron's, with the global layer number
    hf: tuple[str, ...]  # Hugging Face sources, in the order in which they are fused
    hf_shape: tuple[tuple[int, ...], ...]  # of each source
    view: tuple[int, ...]
    axis: int | None  # of `view`, cut by TP; None: every TP rank holds the whole
    layer: int | None  # None for the embedding, the final norm and the output layer
    place: str  # "first" stage, the stage of its "layer", or "last" stage
    kv_groups: int | None = None  # linear_qkv only: how many groups its rows interleave


def whole_param(
    name: str,
    hf: str,
    view: tuple[int, ...],
    axis: int | None,
    *,
    place: str = "layer",
    layer: int | None = None,
) -> ParamSpec:
    """A parameter that is one tensor in both worlds, of the shape `view`."""
    return ParamSpec(
        name=name, hf=(hf,), hf_shape=(view,), view=view, axis=axis, layer=layer, place=place
    )


def param_table(config: ModelConfig) -> list[ParamSpec]:
    """List every parameter of the model once, in a fixed order; tied, the embedding is the output
    layer.
    """
    return family_of(config).params(config)


def num_elements(spec: ParamSpec, tp: int = 1) -> int:
    """Elements of one TP rank's part; rounded down where TP does not divide it."""
    whole = prod(spec.view)
    if spec.axis is None:
        return whole
    return whole // tp


def stage_params(config: ModelConfig, stage: int, pp: int) -> list[ParamSpec]:
    """List what the ranks of one pipeline stage hold, in the order of the table.

    With tied weights and several stages the last one owns a copy of the embedding named
    output_layer.weight. It is loaded from the embedding, and never published or saved.
    """
    table = param_table(config)
    held = [spec for spec in table if stage_of(spec, config.num_layers, pp) == stage]
    if config.tie_word_embeddings and pp > 1 and stage == pp - 1:
        held.append(replace(table[0], name=OUTPUT_LAYER, place="last"))
    return held


def stage_of(spec: ParamSpec, num_layers: int, pp: int) -> int:
    """Return the pipeline stage of a parameter, layers being spread evenly. BadInput if they cannot
    be.
    """
    if num_layers % pp:
        raise BadInput(
            f"num_hidden_layers {num_layers} cannot be spread evenly over {pp} pipeline stages; "
            "choose a pipeline size that divides it"
        )
    if spec.layer is not None:
        return spec.layer // (num_layers // pp)
    if spec.place == "first":
        return 0
    return pp - 1


def name_on_stage(spec: ParamSpec, num_layers: int, pp: int) -> str:
    """Return the parameter's name as its stage's module has it: layers are counted from the stage's
    first.
    """
    if spec.layer is None:
        return spec.name
    head, _, tail = spec.name.split(".", 3)[1:]
    return f"decoder.{head}.{spec.layer % (num_layers // pp)}.{tail}"


def local_shape(spec: ParamSpec, tp: int) -> tuple[int, ...]:
    """Return the shape of one TP rank's parameter in Megatron. BadInput if TP does not divide
    it."""
    return _fold(_local_view_shape(spec, tp))


def local_view(spec: ParamSpec, param: torch.Tensor, tp: int) -> torch.Tensor:
    """View a rank's parameter, in place, as its part of `spec.view`: writing there writes the
    parameter.
    """
    shape = tuple(param.shape)
    assert shape == local_shape(spec, tp), f"{spec.name} has the shape {shape}"
    return param.detach().view(_local_view_shape(spec, tp))


def shard(spec: ParamSpec, full: torch.Tensor, tp_rank: int, tp: int) -> torch.Tensor:
    """Cut one rank's parameter out of the whole tensor in Megatron's layout for TP 1."""
    view = local_view(spec, full, 1)
    if spec.axis is not None:
        view = view.chunk(tp, dim=spec.axis)[tp_rank]
    return view.reshape(local_shape(spec, tp))


def merge(spec: ParamSpec, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join the parameters of all TP ranks into the whole tensor in Megatron's layout for TP 1."""
    if spec.axis is None:
        return shards[0]
    import torch

    views = [local_view(spec, param, len(shards)) for param in shards]
    return torch.cat(views, dim=spec.axis).view(local_shape(spec, 1))


def _local_view_shape(spec: ParamSpec, tp: int) -> tuple[int, ...]:
    if spec.axis is None:
        return spec.view
    size = spec.view[spec.axis]
    if size % tp:
        raise BadInput(
            f"{spec.name} has {size} slices along its cut axis, which tensor parallel size "
            f"{tp} does not divide; choose a size that does"
        )
    return (*spec.view[: spec.axis], size // tp, *spec.view[spec.axis + 1 :])


def _fold(view: tuple[int, ...]) -> tuple[int, ...]:
    """Megatron's parameters are matrices and vectors: linear_fc1's halves lie one below the
    other."""
    if len(view) == 3:
        return (view[0] * view[1], view[2])
    return view
