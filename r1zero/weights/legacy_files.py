"""Megatron's legacy checkpoints: one file of torch.save for each TP and PP index.

    {args, checkpoint_version, iteration, model, optimizer, ...}    virtual stages: model0, model1, ...

Layers are counted from the first of their stage. Only the model is read; files are mapped, so the
rest costs nothing.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial

import torch

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.params import EMBEDDING, OUTPUT_LAYER, ParamSpec, param_table
from r1zero.weights.detect import WeightsOnDisk
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
        super().__init__(found, shape)
        self.tp, self.pp = found.layout
        files = {index: load_pickled(path) for index, path in found.files.items()}
        for index, content in files.items():
            _check_content(found, index, content, shape)
        chunks = _chunks(files[0, 0])
        for index, content in files.items():
            if _chunks(content) != chunks:
                raise BadInput(
                    f"{found.files[index]} holds {', '.join(_chunks(content))}, but "
                    f"{found.files[0, 0]} {', '.join(chunks)}: they are of two checkpoints; copy "
                    "the checkpoint again"
                )
        self.shards = [
            _join([files[tp, pp][chunk] for chunk in chunks for pp in range(self.pp)])
            for tp in range(self.tp)
        ]
        refuse_misfits(
            found.folder, [problem for tp in range(self.tp) for problem in self._problems(tp)]
        )

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The types of all tensors."""
        return {self.shards[0][tensor.name].dtype for tensor in param_table(self.shape)}

    def pieces(self, tensor: ParamSpec) -> list[StoredPiece]:
        """One piece for each TP rank that holds a part."""
        return [self._piece(tensor, tp) for tp in range(self.tp if tensor.axis is not None else 1)]

    def stores(self, name: str) -> bool:
        """Whether a tensor of this name is stored."""
        return name in self.shards[0]

    def _piece(self, tensor: ParamSpec, tp: int) -> StoredPiece:
        param = self.shards[tp][tensor.name]
        if len(tensor.view) == 3:
            param = param.view(2, -1, param.shape[1])
        box = [slice(0, size) for size in param.shape]
        if tensor.axis is not None:
            size = param.shape[tensor.axis]
            box[tensor.axis] = slice(tp * size, (tp + 1) * size)
        return StoredPiece(tuple(box), partial(param.detach))

    def _problems(self, tp: int) -> list[str]:
        state = self.shards[tp]
        if self.tp > 1:
            where = f" (in mp_rank_{tp:02d})"
        else:
            where = ""
        expected = {tensor.name: tensor for tensor in param_table(self.shape)}
        problems = [f"{name} is missing" for name in expected if name not in state]
        for name, value in state.items():
            if name in expected:
                problems += misfit(expected[name], tuple(value.shape), value.dtype, self.tp)
            elif not (name == OUTPUT_LAYER and self.shape.tie_word_embeddings):
                problems.append(f"{name} is unexpected")
        return [problem + where for problem in problems]


def read_args(found: WeightsOnDisk) -> Namespace | None:
    """The arguments that a checkpoint was written with, if it says."""
    args = load_pickled(found.files[0, 0]).get("args")
    if isinstance(args, Namespace):
        return args
    return None


def _check_content(
    found: WeightsOnDisk, index: tuple[int, int], content: object, shape: ModelConfig
) -> None:
    """Refuse a file that holds no model of megatron-core, or was written for another layout."""
    path = found.files[index]
    if not isinstance(content, dict):
        content = {}
    chunk = content.get("model", content.get("model0"))
    if not isinstance(chunk, dict):
        raise BadInput(f"{path} holds no model; give a checkpoint of Megatron")
    if "language_model" in chunk:
        raise BadInput(
            f"{path} holds a model from before megatron-core; convert it with use_mcore_models"
        )
    args = content.get("args")
    if isinstance(args, Namespace):
        given = vars(args)
        saved = given.get("tensor_model_parallel_size"), given.get("pipeline_model_parallel_size")
        if None not in saved and saved != found.layout:
            raise BadInput(
                "{} was saved at TP{} PP{}, but {} holds files of TP{} PP{}; copy the "
                "checkpoint again".format(path, *saved, found.folder, *found.layout)
            )
        check_args(found, args, shape)


def _chunks(content: dict) -> list[str]:
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
