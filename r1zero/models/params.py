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
  or, of a reward model, in fp32
    rm_head.{weight, bias}                    [1, H]      score                     -
    rm_head.{0, 2}.{weight, bias}             [H, H] ...  score.0, score.2          -

Axes: V vocabulary, H hidden, F feed-forward, Q query rows, K key (and value) rows, all global. The
rows of linear_qkv run by key-value group: the group's query heads, its key head, its value head.
That is a dense model (dense.py); a family lists its own.

Loading, saving and publishing read nothing but this table. It needs neither Megatron nor torch: a
rank's weights are a plain dict from these names to tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Literal

from r1zero.errors import BadInput
from r1zero.models.family import family_of

if TYPE_CHECKING:
    import torch

    from r1zero.distributed.placement import RankGrid
    from r1zero.models.config import ModelConfig, ValueHead

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
VALUE_HEAD = "rm_head"  # the module


CutAxis = Literal["tp", "experts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamSpec:
    """One parameter of the whole model.

    `view` is the global tensor shaped so that parallelism cuts one axis of it: linear_fc1 is
    (2, F, H) cut along axis 1 by tensor parallelism, that of all experts (E, 2, F, H) along axis 0
    by expert parallelism, all others are as the table above says.
    """

    name: str  # Megatron's, with the global layer number
    hf: tuple[str, ...]  # Hugging Face sources, in the order in which they are fused
    hf_shape: tuple[tuple[int, ...], ...]  # of each source
    view: tuple[int, ...]
    axis: int | None  # of `view`, that is cut; None: every rank of its stage holds the whole
    layer: int | None  # None for the embedding, the final norm and the output layer
    place: str  # "first" stage, the stage of its "layer", or "last" stage
    kv_groups: int | None = None  # linear_qkv only: how many groups its rows interleave
    cut: CutAxis = "tp"  # what cuts `axis`
    fp32: bool = False  # whatever type the model has
    optional: bool = False  # weights on disk need not have it: it is 0 then

    @property
    def has_halves(self) -> bool:
        """Whether it is a linear_fc1, in which gate lies above up: (2, F, H), of experts (E, 2, F,
        H)."""
        stacked = 1 if self.cut == "experts" else 0
        return len(self.view) - stacked == 3


@dataclass(frozen=True, slots=True)
class Shards:
    """Into how many parts a role cuts the parameters of a stage."""

    tp: int = 1
    ep: int = 1  # of experts

    @classmethod
    def of_grid(cls, grid: RankGrid) -> Shards:
        """As the ranks of a role do."""
        return cls(grid.tp, grid.ep)

    def of(self, spec: ParamSpec) -> int:
        """Into how many parts this parameter."""
        if spec.axis is None:
            return 1
        return self.ep if spec.cut == "experts" else self.tp


WHOLE = Shards()


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Which of these parts a rank holds."""

    tp: int = 0
    ep: int = 0

    @classmethod
    def of_rank(cls, grid: RankGrid, rank: int) -> ShardIndex:
        """As a rank of a role does."""
        return cls(grid.index_of(rank).get("tp", 0), grid.expert_index(rank))

    def of(self, spec: ParamSpec) -> int:
        """Which part of this parameter."""
        if spec.axis is None:
            return 0
        return self.ep if spec.cut == "experts" else self.tp


FIRST = ShardIndex()


@dataclass(frozen=True, slots=True)
class Stages:
    """How many layers each pipeline stage has.

    >>> stages = Stages((2, 3))
    >>> [stages.of_layer(layer) for layer in range(5)], stages.first_layer(1)
    ([0, 0, 1, 1, 1], 2)
    """

    counts: tuple[int, ...]

    @classmethod
    def of(cls, num_layers: int, grid: RankGrid) -> Stages:
        """Of a role. BadInput when its layers cannot be spread so."""
        if not grid.num_layer_list:
            return cls.even(num_layers, grid.pp)
        if sum(grid.num_layer_list) != num_layers:
            raise BadInput(
                f"num_layer_list {list(grid.num_layer_list)} of {grid.role} adds up to "
                f"{sum(grid.num_layer_list)} layers, but the model has {num_layers}"
            )
        return cls(grid.num_layer_list)

    @classmethod
    def even(cls, num_layers: int, pp: int) -> Stages:
        """The same number on each stage. BadInput if PP does not divide the layers."""
        if num_layers % pp:
            raise BadInput(
                f"num_hidden_layers {num_layers} cannot be spread evenly over {pp} pipeline stages; "
                "choose a pipeline size that divides it, or say the layers of each stage "
                "(num_layer_list)"
            )
        return cls((num_layers // pp,) * pp)

    @property
    def last(self) -> int:
        return len(self.counts) - 1

    def first_layer(self, stage: int) -> int:
        """Global number of the first layer of a stage."""
        return sum(self.counts[:stage])

    def layers(self, stage: int) -> range:
        """Global numbers of the layers of a stage."""
        first = self.first_layer(stage)
        return range(first, first + self.counts[stage])

    def of_layer(self, layer: int) -> int:
        """The stage that has a layer."""
        ends = itertools.accumulate(self.counts)
        return next(stage for stage, end in enumerate(ends) if layer < end)


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
    layer. A reward model has a value head in its place.
    """
    table = family_of(config).params(config)
    if config.value_head is None:
        return table
    backbone = [spec for spec in table if spec.name != OUTPUT_LAYER]
    return backbone + value_head_params(config.value_head, config.hidden_size)


def value_head_params(head: ValueHead, hidden: int) -> list[ParamSpec]:
    """The layers of a value head: small, so they are whole on every rank of the last stage."""
    if head.layers == 1:
        weight = _head_param("weight", (head.outputs, hidden), head.fp32)
        if not head.bias:
            return [weight]
        return [weight, replace(_head_param("bias", (head.outputs,), head.fp32), optional=True)]
    return [
        _head_param("0.weight", (hidden, hidden), head.fp32),
        _head_param("0.bias", (hidden,), head.fp32),
        _head_param("2.weight", (head.outputs, hidden), head.fp32),
        _head_param("2.bias", (head.outputs,), head.fp32),
    ]


def _head_param(name: str, view: tuple[int, ...], fp32: bool) -> ParamSpec:
    spec = whole_param(f"{VALUE_HEAD}.{name}", f"score.{name}", view, None, place="last")
    return replace(spec, fp32=fp32)


def single_experts(spec: ParamSpec) -> list[ParamSpec]:
    """Each expert of a parameter that has all of a layer's, as a whole parameter of its own; none of
    any other parameter. Named as in Megatron's grouped experts: weight0, weight1, ...
    """
    if spec.cut != "experts":
        return []
    count = spec.view[0]
    sources = len(spec.hf) // count  # of one expert
    found = []
    for number in range(count):
        own = slice(number * sources, (number + 1) * sources)
        found.append(
            replace(
                spec,
                name=f"{spec.name}{number}",
                hf=spec.hf[own],
                hf_shape=spec.hf_shape[own],
                view=spec.view[1:],
                axis=None,
                cut="tp",
            )
        )
    return found


def num_elements(spec: ParamSpec, shards: Shards = WHOLE) -> int:
    """Elements of one rank's part; rounded down where the parts are not equal."""
    return prod(spec.view) // shards.of(spec)


def stage_params(config: ModelConfig, stage: int, stages: Stages) -> list[ParamSpec]:
    """List what the ranks of one pipeline stage hold, in the order of the table.

    With tied weights and several stages the last one owns a copy of the embedding named
    output_layer.weight. It is loaded from the embedding, and never published or saved.
    """
    table = param_table(config)
    held = [spec for spec in table if stage_of(spec, stages) == stage]
    if config.tie_word_embeddings and 0 < stage == stages.last:
        held.append(replace(table[0], name=OUTPUT_LAYER, place="last"))
    return held


def stage_of(spec: ParamSpec, stages: Stages) -> int:
    """Return the pipeline stage of a parameter."""
    if spec.layer is not None:
        return stages.of_layer(spec.layer)
    if spec.place == "first":
        return 0
    return stages.last


def name_on_stage(spec: ParamSpec, stages: Stages) -> str:
    """Return the parameter's name as its stage's module has it: layers are counted from the stage's
    first.
    """
    if spec.layer is None:
        return spec.name
    head, _, tail = spec.name.split(".", 3)[1:]
    first = stages.first_layer(stages.of_layer(spec.layer))
    return f"decoder.{head}.{spec.layer - first}.{tail}"


def local_shape(spec: ParamSpec, shards: Shards) -> tuple[int, ...]:
    """Return the shape of one rank's parameter in Megatron. BadInput if it cannot be cut into equal
    parts."""
    return _fold(spec, _local_view_shape(spec, shards.of(spec)))


def type_of(spec: ParamSpec, dtype: torch.dtype) -> torch.dtype:
    """The type of a parameter of a model that has `dtype`."""
    import torch

    return torch.float32 if spec.fp32 else dtype


def local_view(spec: ParamSpec, param: torch.Tensor, shards: Shards) -> torch.Tensor:
    """View a rank's parameter, in place, as its part of `spec.view`: writing there writes the
    parameter.
    """
    shape = tuple(param.shape)
    assert shape == local_shape(spec, shards), f"{spec.name} has the shape {shape}"
    return param.detach().view(_local_view_shape(spec, shards.of(spec)))


def shard(spec: ParamSpec, full: torch.Tensor, index: ShardIndex, shards: Shards) -> torch.Tensor:
    """Cut one rank's parameter out of the whole tensor in Megatron's layout."""
    view = local_view(spec, full, WHOLE)
    if spec.axis is not None:
        view = view.chunk(shards.of(spec), dim=spec.axis)[index.of(spec)]
    return view.reshape(local_shape(spec, shards))


def merge(spec: ParamSpec, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join all parts of a parameter into the whole tensor in Megatron's layout."""
    if spec.axis is None:
        return parts[0]
    import torch

    shards = Shards(tp=len(parts), ep=len(parts))
    views = [local_view(spec, param, shards) for param in parts]
    return torch.cat(views, dim=spec.axis).view(local_shape(spec, WHOLE))


def _local_view_shape(spec: ParamSpec, parts: int) -> tuple[int, ...]:
    if spec.axis is None:
        return spec.view
    size = spec.view[spec.axis]
    if size % parts:
        kind = "expert" if spec.cut == "experts" else "tensor"
        raise BadInput(
            f"{spec.name} has {size} slices along its cut axis, which {kind} parallel size "
            f"{parts} does not divide; choose a size that does"
        )
    return (*spec.view[: spec.axis], size // parts, *spec.view[spec.axis + 1 :])


def _fold(spec: ParamSpec, view: tuple[int, ...]) -> tuple[int, ...]:
    """Megatron's parameters are matrices and vectors, stacked where there are several experts:
    linear_fc1's halves lie one below the other.

    (2, F, H) becomes (2 F, H); of experts (E, 2, F, H) becomes (E, 2 F, H), and (E, H, F) stays.
    """
    stacked = 1 if spec.cut == "experts" else 0
    matrix = view[stacked:]
    if len(matrix) == 3:
        return (*view[:stacked], matrix[0] * matrix[1], matrix[2])
    return view
