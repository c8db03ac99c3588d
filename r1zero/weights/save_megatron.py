"""Write Megatron checkpoints, in either layout, one tensor in memory at a time."""

from __future__ import annotations

import io
import itertools
import json
import os
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from r1zero.models.config import ModelConfig
from r1zero.models.moe import experts_of, has_experts, layers_are_alike
from r1zero.models.params import (
    WHOLE,
    ParamSpec,
    ShardIndex,
    Shards,
    Stages,
    local_shape,
    name_on_stage,
    param_table,
    shard,
    stage_params,
    type_of,
)
from r1zero.weights import legacy_experts
from r1zero.weights.detect import LEGACY_FILE, TRACKER, folder_name
from r1zero.weights.legacy_files import as_legacy
from r1zero.weights.source import FUSED_NORMS, PADDED, SHARDED_EXPERTS, Weights

State = dict[str, torch.Tensor]

ITERATION = 1  # of converted weights; Megatron takes neither 0 nor, everywhere, `release`
# In the name of a module that multiplies, and so may keep fp8 state of Transformer Engine; Megatron's
# loader asks for that of all of them.
PRODUCT = ".linear_"


@dataclass(frozen=True, slots=True)
class LegacyLayout:
    """How legacy files cut a model."""

    tp: int
    layers: tuple[int, ...]  # of each pipeline stage
    vocab_multiple: int = 1  # the vocabulary is padded to a multiple of this times TP
    ep: int = 1
    grouped_experts: bool = False  # named as by GroupedMLP, else as by SequentialMLP

    @property
    def pp(self) -> int:
        return len(self.layers)

    def padded(self, rows: int) -> int:
        """Rows of the padded vocabulary."""
        step = self.vocab_multiple * self.tp
        return -(-rows // step) * step


def save_legacy(folder: Path, weights: Weights, dtype: torch.dtype, layout: LegacyLayout) -> None:
    """Write a file for each TP, PP and EP index, and the tracker, into a new `folder`. OSError when
    it is full.

    A stage's shards are gathered in mapped scratch files beside, so memory holds one whole tensor.
    """
    iteration = folder / f"iter_{ITERATION:07d}"
    iteration.mkdir(parents=True)
    args = _arguments(weights, dtype, layout)
    for stage in range(layout.pp):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            shards = _stage_shards(weights, dtype, layout, stage, Path(scratch))
            for (tp, ep), model in shards.items():
                path = iteration / _rank_folder(layout, tp, stage, ep) / LEGACY_FILE
                path.parent.mkdir()
                torch.save(
                    {
                        "args": args,
                        "checkpoint_version": 3.0,
                        "iteration": ITERATION,
                        "model": model,
                        "num_floating_point_operations_so_far": 0,
                    },
                    path,
                )
    (folder / TRACKER).write_text(str(ITERATION))


def save_dist(folder: Path, weights: Weights, dtype: torch.dtype) -> None:
    """Write a torch_dist iteration of whole tensors, for any layout, and the tracker, into a new
    `folder`."""
    iteration = folder / f"iter_{ITERATION:07d}"
    iteration.mkdir(parents=True)
    with warnings.catch_warnings():
        # one process is all it takes
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            checkpoint.save(
                {},
                storage_writer=FileSystemWriter(iteration, thread_count=1),
                planner=_Planner(weights, dtype),
                no_dist=True,
            )
        except checkpoint.CheckpointException as error:
            [(cause, _)] = error.failures.values()  # of the one rank
            raise cause from None
    args = _arguments(weights, dtype, LegacyLayout(tp=1, layers=(weights.shape.num_layers,)))
    torch.save(
        {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": ITERATION,
            "num_floating_point_operations_so_far": 0,
        },
        iteration / "common.pt",
    )
    (iteration / "metadata.json").write_text(
        json.dumps(
            {
                "sharded_backend": "torch_dist",
                "sharded_backend_version": 1,
                "common_backend": "torch",
                "common_backend_version": 1,
            }
        )
    )
    (folder / TRACKER).write_text(str(ITERATION))


def _arguments(weights: Weights, dtype: torch.dtype, layout: LegacyLayout) -> Namespace:
    """What Megatron compares with its own arguments when it loads."""
    padded = layout.padded(weights.shape.vocab_size)
    keys = weights.shape.to_megatron() | {"padded_vocab_size": padded}
    return Namespace(
        **keys,
        group_query_attention=weights.shape.latent is None,
        position_embedding_type="rope",
        swiglu=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        params_dtype=dtype,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        iteration=ITERATION,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )


# Legacy files.


def _rank_folder(layout: LegacyLayout, tp: int, stage: int, ep: int) -> str:
    """The name of a rank's folder, which has no stage or no expert rank where there is only one."""
    numbers = [tp]
    if layout.pp > 1:
        numbers.append(stage)
    if layout.ep > 1:
        numbers.append(ep)
    return folder_name(*numbers)


def _stage_shards(
    weights: Weights, dtype: torch.dtype, layout: LegacyLayout, stage: int, scratch: Path
) -> dict[tuple[int, int], State]:
    """The parameters of one stage by Megatron's names, for each TP and EP rank, on mapped files."""
    ranks = itertools.product(range(layout.tp), range(layout.ep))
    models: dict[tuple[int, int], State] = {rank: {} for rank in ranks}
    stages = Stages(layout.layers)
    shards = Shards(layout.tp, layout.ep)
    for tensor in stage_params(weights.shape, stage, stages):
        whole = weights.read(tensor).to(type_of(tensor, dtype))
        tensor = as_legacy(tensor)
        if tensor.name in PADDED:
            tensor, whole = _pad(tensor, whole, layout.padded(tensor.view[0]))
        name = name_on_stage(tensor, stages)
        parts = []
        for number in range(shards.of(tensor)):
            part = shard(tensor, whole, ShardIndex(number, number), shards)
            folder = scratch / str(number)
            if tensor.cut == "experts":
                parts.append(_mapped_experts(folder, name, part, layout))
            else:
                parts.append({name: _mapped(folder / name, part)})
        for (tp, ep), model in models.items():
            model.update(parts[ShardIndex(tp, ep).of(tensor)])
    return models


def _mapped_experts(folder: Path, name: str, experts: torch.Tensor, layout: LegacyLayout) -> State:
    """A rank's experts of one layer by the names of one of Megatron's modules, on a mapped file."""
    if layout.grouped_experts:
        name, experts = legacy_experts.grouped(name, experts)
        return {name: _mapped(folder / name, experts)}
    return legacy_experts.sequential(name, _mapped(folder / name, experts))


def _mapped(path: Path, part: torch.Tensor) -> torch.Tensor:
    """A copy of `part` on a new file."""
    path.parent.mkdir(exist_ok=True)
    return _map(path, part.numel(), part.dtype).view(part.shape).copy_(part)


def _map(path: Path, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A vector that lies in a new file. OSError when the disk is full, which later would kill the
    process."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, numel * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=numel, dtype=dtype)


def _pad(tensor: ParamSpec, whole: torch.Tensor, rows: int) -> tuple[ParamSpec, torch.Tensor]:
    """Repeat the last row of a vocabulary until there are `rows`."""
    if rows == len(whole):
        return tensor, whole
    return (
        replace(tensor, view=(rows, tensor.view[1])),
        torch.cat([whole, whole[-1:].expand(rows - len(whole), -1)]),
    )


# torch_dist.


class _Planner(DefaultSavePlanner):
    """Tells torch's writer which tensors there are, and reads each when the writer asks for it."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        super().__init__(flatten_state_dict=False)
        self._weights = weights
        self._shape = weights.shape
        self._dtype = dtype
        self._tensors: dict[MetadataIndex, ParamSpec] = {}

    def create_local_plan(self) -> SavePlan:
        """One item for each tensor, and for each empty place of fp8 state."""
        items = []
        for tensor in param_table(self._shape):
            for name in _sharded_names(self._shape, tensor):
                item = self._item(tensor, name)
                self._tensors[item.index] = tensor
                items.append(item)
        for key in _extra_states(self._shape):
            items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Read the item's tensor."""
        if write_item.type == WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([None], nothing)
            return nothing
        tensor = self._tensors[write_item.index]
        values = self._weights.read(tensor).to(type_of(tensor, self._dtype))
        assert write_item.tensor_data is not None, "the other items are bytes"
        return values.view(write_item.tensor_data.chunk.sizes)

    def _item(self, tensor: ParamSpec, name: str) -> WriteItem:
        """A whole tensor; where layers are stacked, at its layer's place in the stack."""
        size = local_shape(tensor, WHOLE)
        offsets = (0,) * len(size)
        whole = size
        if tensor.layer is not None and layers_are_alike(self._shape):
            offsets = (tensor.layer, *offsets)
            whole = (self._shape.num_layers, *size)
            size = (1, *size)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(size))
        data = TensorWriteData(
            chunk, TensorProperties(dtype=type_of(tensor, self._dtype)), torch.Size(whole)
        )
        return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def _sharded_names(shape: ModelConfig, tensor: ParamSpec) -> list[str]:
    """Megatron's sharded names of a tensor.

    The norm in front of experts has two: Megatron's own modules call it as in front of a dense MLP,
    Transformer Engine's do not. With latent attention norms have their plain names.
    """
    if tensor.layer is None:
        return [tensor.name]
    tail = tensor.name.removeprefix(f"decoder.layers.{tensor.layer}.")
    tails = [tail.replace("mlp.experts.", f"mlp.{SHARDED_EXPERTS}.")]
    if shape.latent is not None:
        return [_layer_prefix(shape, tensor.layer) + tail for tail in tails]
    for fused, plain in FUSED_NORMS.items():
        if tail == plain:
            tails = [fused]
    if tail == "pre_mlp_layernorm.weight" and has_experts(shape, tensor.layer):
        tails.append(tail)
    return [_layer_prefix(shape, tensor.layer) + tail for tail in tails]


def _layer_prefix(shape: ModelConfig, layer: int) -> str:
    """The beginning of a layer's sharded names; unlike layers are not stacked, but numbered."""
    if layers_are_alike(shape):
        return "decoder.layers."
    return f"decoder.layers.{layer}."


def _extra_states(shape: ModelConfig) -> Iterator[str]:
    """Keys of the fp8 states of all layers' modules: those with products, and attention itself."""
    for tensor in param_table(shape):
        module = tensor.name.removesuffix(".weight")
        if tensor.layer is None or PRODUCT not in module or tensor.name == module:
            continue
        tail = module.removeprefix(f"decoder.layers.{tensor.layer}.")
        if tail == "self_attention.linear_proj":
            yield from _state_keys(shape, tensor.layer, "self_attention.core_attention")
        yield from _state_keys(shape, tensor.layer, tail)


def _state_keys(shape: ModelConfig, layer: int, module: str) -> Iterator[str]:
    """Keys of a module's states: its index among layers and experts, and how many there are.

    Expert 5 of 8 in layer 2 of 4: linear_fc1._extra_state/shard_2.5_4.8, or shard_5_8 where layers
    are not stacked.
    """
    place: list[tuple[int, int]] = []
    if layers_are_alike(shape):
        place.append((layer, shape.num_layers))
    if not module.startswith("mlp.experts."):
        yield _state_key(_layer_prefix(shape, layer) + module, place)
        return
    name = _layer_prefix(shape, layer) + module.replace("mlp.experts.", f"mlp.{SHARDED_EXPERTS}.")
    count = experts_of(shape).count
    for expert in range(count):
        yield _state_key(name, [*place, (expert, count)])


def _state_key(module: str, place: Sequence[tuple[int, int]]) -> str:
    """The key of a module's state, at `place`: (index, size) for each axis."""
    axes = place or [(0, 1)]
    offsets = ".".join(str(index) for index, _ in axes)
    sizes = ".".join(str(size) for _, size in axes)
    return f"{module}._extra_state/shard_{offsets}_{sizes}"
