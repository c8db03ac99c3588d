"""Megatron's legacy checkpoints: one file of torch.save for each TP, PP and EP index.

    {args, checkpoint_version, iteration, model, optimizer, ...}    virtual stages: model0, model1, ...

Layers are counted from the first of their stage. Only the model is read; files are mapped, so the
rest costs nothing.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.params import EMBEDDING, OUTPUT_LAYER, VALUE_HEAD, ParamSpec, param_table
from r1zero.weights import legacy_experts
from r1zero.weights.detect import ShardPlace, WeightsOnDisk, layout_text
from r1zero.weights.headers import refuse_misfits
from r1zero.weights.source import (
    MegatronWeights,
    StoredPiece,
    canonical,
    check_args,
    misfit,
)
from r1zero.weights.unpickle import load_pickled

State = dict[str, torch.Tensor]


class LegacyWeights(MegatronWeights):
    """The weights of an iteration's mp_rank files."""

    def __init__(self, found: WeightsOnDisk, shape: ModelConfig) -> None:
        """Map all files and check that together they hold the model. BadInput listing what does not
        fit."""
        contents = {place: load_pickled(path) for place, path in found.files.items()}
        found = _with_expert_ranks(found, contents)
        super().__init__(found, shape)
        self.tp, self.pp, self.ep = found.layout
        files = dict(zip(found.files, contents.values(), strict=True))
        for place, content in files.items():
            _check_content(found, place, content, shape)
        states = _states(found, files)
        self._experts = {
            tensor.name: legacy_experts.take_pieces(tensor, states, self.tp, self.ep)
            for tensor in param_table(shape)
            if tensor.cut == "experts"
        }
        self.shards = [
            next(state for (tp, _), state in states.items() if tp == index)
            for index in range(self.tp)
        ]
        refuse_misfits(found.folder, self._expert_problems() + self._problems(states))

    @property
    def dtypes(self) -> set[torch.dtype]:
        """As Weights.dtypes."""
        in_fp32 = {tensor.name for tensor in param_table(self.shape) if tensor.fp32}
        found = {value.dtype for name, value in self.shards[0].items() if name not in in_fp32}
        for pieces in self._experts.values():
            found.update(piece.load().dtype for piece in pieces)
        return found

    def pieces(self, tensor: ParamSpec) -> list[StoredPiece]:
        """One piece for each TP rank that holds a part, or for each expert's part."""
        if tensor.cut == "experts":
            return self._experts[tensor.name]
        tensor = self._as_stored(tensor)
        return [self._piece(tensor, tp) for tp in range(self.tp if tensor.axis is not None else 1)]

    def stores(self, name: str) -> bool:
        """Whether a tensor of this name is stored."""
        return name in self.shards[0]

    def _as_stored(self, tensor: ParamSpec) -> ParamSpec:
        """The parameter as these files cut it: a value head of one layer by columns, or not at
        all."""
        stored = self.shards[0].get(tensor.name)
        if stored is None or tuple(stored.shape) == tensor.view:
            return tensor
        return as_legacy(tensor)

    def _piece(self, tensor: ParamSpec, tp: int) -> StoredPiece:
        param = self.shards[tp][tensor.name]
        if len(tensor.view) == 3:
            param = param.view(2, -1, param.shape[1])
        box = [slice(0, size) for size in param.shape]
        if tensor.axis is not None:
            size = param.shape[tensor.axis]
            box[tensor.axis] = slice(tp * size, (tp + 1) * size)
        return StoredPiece(tuple(box), partial(param.detach))

    def _expert_problems(self) -> list[str]:
        """What is wrong with the experts of all files together."""
        found = []
        for tensor in param_table(self.shape):
            if tensor.cut == "experts":
                found += legacy_experts.problems(tensor, self._experts[tensor.name])
        return found

    def _problems(self, states: Mapping[tuple[int, int], State]) -> list[str]:
        """What is wrong with the other tensors, which every expert rank's file has."""
        table = param_table(self.shape)
        expected = {tensor.name: tensor for tensor in table if tensor.cut != "experts"}
        found = []
        for (tp, ep), state in states.items():
            where = ""
            if len(states) > 1:
                where = f" (in {self._folders_of(tp, ep)})"
            found += [problem + where for problem in self._state_problems(expected, state)]
        return found

    def _folders_of(self, tp: int, ep: int) -> str:
        """The beginning of the names of these ranks' folders, and the expert rank behind it."""
        if self.ep == 1:
            return f"mp_rank_{tp:02d}"
        return f"mp_rank_{tp:02d} of expert rank {ep}"

    def _state_problems(self, expected: Mapping[str, ParamSpec], state: State) -> list[str]:
        problems = [
            f"{name} is missing"
            for name, tensor in expected.items()
            if name not in state and not tensor.optional
        ]
        for name, value in state.items():
            if name in expected:
                tensor = self._as_stored(expected[name])
                problems += misfit(tensor, tuple(value.shape), value.dtype, self.tp)
            elif not (name == OUTPUT_LAYER and self.shape.may_have_spare_output_layer):
                problems.append(f"{name} is unexpected")
        return problems


def as_legacy(tensor: ParamSpec) -> ParamSpec:
    """A parameter as legacy files cut it over TP ranks: of a value head with one layer, which is whole
    on every rank here, each has some of the columns, as MindSpeed-LLM's reward model has."""
    if tensor.name == f"{VALUE_HEAD}.weight":
        return replace(tensor, axis=1)
    return tensor


def read_args(found: WeightsOnDisk) -> Namespace | None:
    """The arguments that a checkpoint was written with, if it says."""
    args = load_pickled(min(found.files.values())).get("args")
    if isinstance(args, Namespace):
        return args
    return None


def _with_expert_ranks(
    found: WeightsOnDisk, contents: Mapping[ShardPlace, object]
) -> WeightsOnDisk:
    """Tell stages from expert ranks where a folder's name has two numbers.

    Of a pipeline only the first stage has the embedding. Where the second number is an expert
    rank's, every file has it.
    """
    if found.layout.pp == 1 or found.layout.ep > 1:
        return found
    later = next(content for place, content in contents.items() if place.pp > 0)
    if EMBEDDING not in map(canonical, _first_chunk(later) or {}):
        return found
    files = {ShardPlace(tp, 0, ep): path for (tp, ep, _), path in found.files.items()}
    return replace(found, files=files)


def _first_chunk(content: object) -> Mapping[str, object] | None:
    """A file's part of the model, or the first of several; None when it has none."""
    if not isinstance(content, dict):
        return None
    chunk = content.get("model", content.get("model0"))
    if isinstance(chunk, dict):
        return chunk
    return None


def _check_content(
    found: WeightsOnDisk, place: ShardPlace, content: object, shape: ModelConfig
) -> None:
    """Refuse a file that holds no model of megatron-core, or was written for another layout."""
    path = found.files[place]
    chunk = _first_chunk(content)
    if chunk is None or not isinstance(content, dict):
        raise BadInput(f"{path} holds no model; give a checkpoint of Megatron")
    if "language_model" in chunk:
        raise BadInput(
            f"{path} holds a model from before megatron-core; convert it with use_mcore_models"
        )
    args = content.get("args")
    if isinstance(args, Namespace):
        saved = _saved_layout(vars(args))
        if saved not in (None, found.layout):
            raise BadInput(
                f"{path} was saved at {layout_text(*saved)}, but {found.folder} holds files of "
                f"{layout_text(*found.layout)}; copy the checkpoint again"
            )
        check_args(found, args, shape)


def _saved_layout(given: Mapping[str, Any]) -> ShardPlace | None:
    """TP, PP and EP sizes by the arguments of a checkpoint, if they say."""
    tp = given.get("tensor_model_parallel_size")
    pp = given.get("pipeline_model_parallel_size")
    if tp is None or pp is None:
        return None
    return ShardPlace(tp, pp, given.get("expert_model_parallel_size") or 1)


def _states(
    found: WeightsOnDisk, files: Mapping[ShardPlace, Mapping[str, Any]]
) -> dict[tuple[int, int], State]:
    """The tensors of all stages by TP and EP index. BadInput when files do not belong together."""
    first = min(files)
    chunks = _chunks(files[first])
    for place, content in files.items():
        if _chunks(content) != chunks:
            raise BadInput(
                f"{found.files[place]} holds {', '.join(_chunks(content))}, but "
                f"{found.files[first]} {', '.join(chunks)}: they are of two checkpoints; copy "
                "the checkpoint again"
            )
    states = {}
    for tp, ep in sorted({(place.tp, place.ep) for place in files}):
        stages = [files.get(ShardPlace(tp, pp, ep)) for pp in range(found.layout.pp)]
        if None in stages:
            raise BadInput(
                f"{found.folder} lacks the file of TP rank {tp} on stage {stages.index(None)}; copy "
                "the checkpoint again"
            )
        states[tp, ep] = _join([stage[chunk] for chunk in chunks for stage in stages if stage])
    return states


def _chunks(content: Mapping[str, Any]) -> list[str]:
    """The keys of a file's parts of the model: several with virtual pipeline stages."""
    if "model" in content:
        return ["model"]
    return sorted(
        (key for key in content if key.removeprefix("model").isdecimal()),
        key=lambda key: int(key[5:]),
    )


def _join(stages: list[dict[str, object]]) -> State:
    """Name the tensors of one TP rank's stages as models/params.py does, in the order of the
    layers."""
    state: State = {}
    offset = 0
    for number, stage in enumerate(stages):
        seen = set()
        for stored, value in stage.items():
            name = canonical(stored)
            if name is None or not isinstance(value, torch.Tensor):
                continue
            prefix, _, rest = name.partition("decoder.layers.")
            if rest and not prefix:
                layer, _, tail = rest.partition(".")
                seen.add(int(layer))
                name = f"decoder.layers.{offset + int(layer)}.{tail}"
            elif number != (0 if name == EMBEDDING else len(stages) - 1):
                name = f"{name} on stage {number} of {len(stages)}"
            state[name] = value
        offset += len(seen)
    return state
