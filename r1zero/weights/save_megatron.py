"""Write Megatron checkpoints, in either layout, one tensor in memory at a time."""

from __future__ import annotations

import io
import json
import os
import tempfile
import warnings
from argparse import Namespace
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
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

from r1zero.models.params import (
    OUTPUT_LAYER,
    WHOLE,
    ParamSpec,
    ShardIndex,
    Shards,
    local_shape,
    param_table,
    shard,
)
from r1zero.weights.detect import TRACKER
from r1zero.weights.source import FUSED_NORMS, PADDED, Weights

ITERATION = 1  # of converted weights; Megatron takes neither 0 nor, everywhere, `release`
# Modules of a layer that may keep fp8 state of Transformer Engine; Megatron's loader asks for all
# of them.
EXTRA_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


@dataclass(frozen=True, slots=True)
class LegacyLayout:
    """How legacy files cut a model."""

    tp: int
    layers: tuple[int, ...]  # of each pipeline stage
    vocab_multiple: int = 1  # the vocabulary is padded to a multiple of this times TP

    @property
    def pp(self) -> int:
        return len(self.layers)

    def padded(self, rows: int) -> int:
        """Rows of the padded vocabulary."""
        step = self.vocab_multiple * self.tp
        return -(-rows // step) * step


def save_legacy(folder: Path, weights: Weights, dtype: torch.dtype, layout: LegacyLayout) -> None:
    """Write a file for each TP and PP index, and the tracker, into a new `folder`. OSError when it
    is full.

    A stage's shards are gathered in mapped scratch files beside, so memory holds one whole tensor.
    """
    (folder / f"iter_{ITERATION:07d}").mkdir(parents=True)
    args = _arguments(weights, dtype, layout.tp, layout.pp, layout.padded(weights.shape.vocab_size))
    for stage in range(layout.pp):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            shards = _stage_shards(weights, dtype, layout, stage, Path(scratch))
            for tp_rank, model in enumerate(shards):
                name = f"mp_rank_{tp_rank:02d}" + f"_{stage:03d}" * (layout.pp > 1)
                path = folder / f"iter_{ITERATION:07d}" / name / "model_optim_rng.pt"
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
    args = _arguments(weights, dtype, 1, 1, weights.shape.vocab_size)
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


def _arguments(
    weights: Weights, dtype: torch.dtype, tp: int, pp: int, padded_vocab_size: int
) -> Namespace:
    """What Megatron compares with its own arguments when it loads."""
    keys = weights.shape.to_megatron() | {"padded_vocab_size": padded_vocab_size}
    return Namespace(
        **keys,
        group_query_attention=True,
        position_embedding_type="rope",
        swiglu=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        params_dtype=dtype,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        iteration=ITERATION,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )


# Legacy files.


def _stage_shards(
    weights: Weights, dtype: torch.dtype, layout: LegacyLayout, stage: int, scratch: Path
) -> list[dict[str, torch.Tensor]]:
    """The parameters of one stage by Megatron's names, for each TP rank, on mapped files."""
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(layout.tp)]
    first = sum(layout.layers[:stage])
    parts = Shards(tp=layout.tp)
    for tensor in _held(weights, layout, stage):
        whole = weights.read(tensor).to(dtype)
        if tensor.name in PADDED:
            tensor, whole = _pad(tensor, whole, layout.padded(tensor.view[0]))
        name = tensor.name
        if tensor.layer is not None:
            name = name.replace(f"layers.{tensor.layer}.", f"layers.{tensor.layer - first}.", 1)
        for tp_rank, model in enumerate(shards):
            size = local_shape(tensor, parts)
            mapped = _map(scratch / f"{tp_rank}.{name}", prod(size), dtype)
            part = shard(tensor, whole, ShardIndex(tp=tp_rank), parts)
            model[name] = mapped.view(size).copy_(part)
    return shards


def _map(path: Path, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A vector that lies in a new file. OSError when the disk is full, which later would kill the
    process."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, numel * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=numel, dtype=dtype)


def _held(weights: Weights, layout: LegacyLayout, stage: int) -> list[ParamSpec]:
    """What a stage holds; the last of several has a copy of a tied embedding."""
    ends = list(accumulate(layout.layers))
    table = param_table(weights.shape)
    held = [
        tensor
        for tensor in table
        if (
            stage == (0 if tensor.place == "first" else layout.pp - 1)
            if tensor.layer is None
            else ends[stage] - layout.layers[stage] <= tensor.layer < ends[stage]
        )
    ]
    if weights.shape.tie_word_embeddings and layout.pp > 1 and stage == layout.pp - 1:
        held.append(replace(table[0], name=OUTPUT_LAYER, place="last"))
    return held


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
        self._dtype = dtype
        self._tensors: dict[MetadataIndex, ParamSpec] = {}

    def create_local_plan(self) -> SavePlan:
        """One item for each tensor, stacked by layer, and for each empty place of fp8 state."""
        count = self._weights.shape.num_layers
        items = []
        for tensor in param_table(self._weights.shape):
            items.append(self._item(tensor, count))
            self._tensors[items[-1].index] = tensor
        for layer in range(count):
            items += [
                WriteItem(
                    MetadataIndex(f"decoder.layers.{module}._extra_state/shard_{layer}_{count}"),
                    WriteItemType.BYTE_IO,
                )
                for module in EXTRA_STATES
            ]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Read the item's tensor."""
        if write_item.type == WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([None], nothing)
            return nothing
        values = self._weights.read(self._tensors[write_item.index]).to(self._dtype)
        assert write_item.tensor_data is not None, "the other items are bytes"
        return values.view(write_item.tensor_data.chunk.sizes)

    def _item(self, tensor: ParamSpec, count: int) -> WriteItem:
        size = local_shape(tensor, WHOLE)
        name = tensor.name
        offsets = (0,) * len(size)
        whole = size
        if tensor.layer is not None:
            name = name.replace(f"layers.{tensor.layer}.", "layers.", 1)
            name = next(
                (
                    name.removesuffix(plain) + fused
                    for fused, plain in FUSED_NORMS.items()
                    if name.endswith(f"layers.{plain}")
                ),
                name,
            )
            offsets = (tensor.layer, *offsets)
            whole = (count, *size)
            size = (1, *size)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(size))
        data = TensorWriteData(chunk, TensorProperties(dtype=self._dtype), torch.Size(whole))
        return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)
