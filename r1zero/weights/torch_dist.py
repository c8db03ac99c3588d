"""Megatron's torch_dist checkpoints: any number of .distcp files, and .metadata that says what lies
where.

A tensor lies there in chunks of its global form; the same parameter of all layers is one tensor
with the layers as its first axis, or, of uneven models, one tensor a layer. The experts of a layer
are one tensor with an axis of experts before its own. The gate and up halves of linear_fc1 lie one
below the other. Optimizer states lie in the same files under names of their
own; they are left alone.
"""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from math import prod

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.layout import Box
from r1zero.models.lora import A_NAME
from r1zero.models.params import OUTPUT_LAYER, VALUE_HEAD, ParamSpec, param_table
from r1zero.weights.detect import WeightsOnDisk
from r1zero.weights.headers import refuse_misfits
from r1zero.weights.source import (
    MegatronWeights,
    StoredPiece,
    canonical,
    check_args,
    misfit,
)
from r1zero.weights.unpickle import load_metadata, load_pickled

PARTS_OF_MODEL = ("embedding", "decoder", "output_layer", VALUE_HEAD, "encoder", "mtp")
# endings of linear_fc1's name when its halves are stored as two tensors
HALVES = {"_w": 0, "_v": 1}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor of the model lies."""

    key: str  # in the metadata
    entry: TensorStorageMetadata
    layer: int | None  # its index along the first axis, when layers are stacked

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor of one layer."""
        return tuple(self.entry.size)[self.layer is not None :]

    def chunks(self) -> Iterator[tuple[ChunkStorageMetadata, tuple[int, ...], tuple[int, ...]]]:
        """Yield the chunks that hold this layer with their offsets and sizes, the axis of layers
        left out."""
        for chunk in self.entry.chunks:
            offsets = tuple(chunk.offsets)
            sizes = tuple(chunk.sizes)
            if self.layer is None:
                yield chunk, offsets, sizes
            elif offsets[0] <= self.layer < offsets[0] + sizes[0]:
                yield chunk, offsets[1:], sizes[1:]


class DistWeights(MegatronWeights):
    """The weights of an iteration's .distcp files."""

    def __init__(self, found: WeightsOnDisk, shape: ModelConfig) -> None:
        """Read the metadata and check that the model is there. BadInput listing what does not
        fit."""
        super().__init__(found, shape)
        if (args := read_args(found)) is not None:
            check_args(found, args, shape)
        content = load_metadata(found.folder)
        self._places = content.storage_data
        self.stored = {
            name: stored
            for key, entry in content.state_dict_metadata.items()
            for name, stored in _names(key, entry)
        }
        if any(name.endswith(A_NAME) for name in self.stored):
            raise BadInput(
                f"{found.folder} holds adapters (actor_rollout.lora) and not the model they belong "
                "to; let the run end, which writes both merged into model/ of its folder"
            )
        refuse_misfits(found.folder, self._problems())
        self._check_files()

    @property
    def dtypes(self) -> set[torch.dtype]:
        """As Weights.dtypes."""
        result: set[torch.dtype] = set()
        for tensor in param_table(self.shape):
            if tensor.fp32:
                continue
            for stored, _ in self._parts(tensor):
                result.add(stored.entry.properties.dtype)
        return result

    def pieces(self, tensor: ParamSpec) -> list[StoredPiece]:
        """One piece for each chunk, two for a chunk of linear_fc1 that reaches into both halves."""
        pieces: list[StoredPiece] = []
        for stored, half in self._parts(tensor):
            for chunk, offsets, sizes in stored.chunks():
                load = cache(partial(self._load, stored, chunk))
                box = tuple(
                    slice(start, start + size) for start, size in zip(offsets, sizes, strict=True)
                )
                if tensor.has_halves:
                    pieces += _halves(box, load, half, tensor.view[-2])
                else:
                    pieces.append(StoredPiece(box, load))
        return pieces

    def stores(self, name: str) -> bool:
        """Whether a tensor of this name is stored."""
        return name in self.stored

    def _parts(self, tensor: ParamSpec) -> list[tuple[Stored, int]]:
        """The stored tensors that make up one of ours, with the half of linear_fc1 at which each
        starts."""
        whole = self.stored.get(tensor.name)
        if whole is not None:
            return [(whole, 0)]
        return [
            (self.stored[tensor.name + end], half)
            for end, half in HALVES.items()
            if tensor.name + end in self.stored
        ]

    def _load(self, stored: Stored, chunk: ChunkStorageMetadata) -> torch.Tensor:
        """Read one chunk and take this layer's part of it."""
        place = self._places[MetadataIndex(stored.key, chunk.offsets)]
        path = self.found.folder / place.relative_path
        with path.open("rb") as file:
            file.seek(place.offset)
            content = io.BytesIO(file.read(place.length))
        try:
            values = torch.load(content, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError):
            values = None
        if not isinstance(values, torch.Tensor) or values.shape != chunk.sizes:
            raise BadInput(
                f"{path} is damaged where {stored.key} should be; copy the checkpoint again"
            )
        if stored.layer is None:
            return values
        return values[stored.layer - chunk.offsets[0]]

    def _problems(self) -> list[str]:
        problems = []
        if self.shape.may_have_spare_output_layer:
            known = {OUTPUT_LAYER}
        else:
            known = set()
        for tensor in param_table(self.shape):
            parts = self._parts(tensor)
            known |= {tensor.name} | (
                {tensor.name + end for end in HALVES} if len(parts) == 2 else set()
            )
            if not parts and tensor.optional:
                continue
            if not parts:
                problems.append(f"{tensor.name} is missing")
                continue
            rows = sum(stored.shape[0] for stored, _ in parts)
            problems += misfit(
                tensor, (rows, *parts[0][0].shape[1:]), parts[0][0].entry.properties.dtype
            )
            problems += [
                f"{tensor.name} has parts that were never written"
                for stored, _ in parts
                if sum(prod(sizes) for _, _, sizes in stored.chunks()) != prod(stored.shape)
            ]
        return problems + [f"{name} is unexpected" for name in self.stored if name not in known]

    def _check_files(self) -> None:
        """BadInput when a file that holds weights is missing or cut off."""
        ends: dict[str, int] = {}
        for stored in self.stored.values():
            for chunk, _, _ in stored.chunks():
                place = self._places[MetadataIndex(stored.key, chunk.offsets)]
                ends[place.relative_path] = max(
                    ends.get(place.relative_path, 0), place.offset + place.length
                )
        for name, end in sorted(ends.items()):
            path = self.found.folder / name
            if path.is_file():
                size = path.stat().st_size
            else:
                size = None
            if size is None or size < end:
                if size is None:
                    state = "is missing"
                else:
                    state = f"has {size} bytes instead of at least {end}: it was cut off"
                raise BadInput(f"{path} {state}; copy the checkpoint again")


def read_args(found: WeightsOnDisk) -> Namespace | None:
    """The arguments that a checkpoint was written with, if it says."""
    common = load_pickled(found.folder / "common.pt")
    if isinstance(common, dict):
        args = common.get("args")
    else:
        args = None
    if isinstance(args, Namespace):
        return args
    return None


def _names(key: str, entry: object) -> Iterator[tuple[str, Stored]]:
    """Name each layer of a stored tensor as models/params.py does; nothing for what is not of the
    model."""
    if not isinstance(entry, TensorStorageMetadata):
        return
    name = canonical(key)
    if name is None or name.split(".")[0] not in PARTS_OF_MODEL:
        return
    prefix, _, tail = name.partition("decoder.layers.")
    if not tail or prefix or tail.split(".")[0].isdecimal():
        yield name, Stored(key, entry, None)
        return
    for layer in range(entry.size[0]):
        yield f"decoder.layers.{layer}.{tail}", Stored(key, entry, layer)


def _halves(
    stored: Box, load: Callable[[], torch.Tensor], half: int, ffn: int
) -> Iterator[StoredPiece]:
    """Turn rows of [gate; up], counted from the start of `half`, into regions of the view (2, F,
    H), or of experts (E, 2, F, H).

    With F 4, the rows 2 to 5 are the last two of gate and the first two of up:

    >>> rows = torch.arange(2, 6)[:, None]
    >>> for piece in _halves((slice(2, 6), slice(0, 1)), lambda: rows, half=0, ffn=4):
    ...     print(piece.box[:2], piece.load().flatten().tolist())
    (slice(0, 1, None), slice(2, 4, None)) [2, 3]
    (slice(1, 2, None), slice(0, 2, None)) [4, 5]
    """
    *experts, rows, columns = stored
    begin = rows.start + half * ffn
    end = rows.stop + half * ffn
    for number in range(2):
        start = max(begin, number * ffn)
        stop = min(end, (number + 1) * ffn)
        if start < stop:
            inside = slice(start - begin, stop - begin)
            box = (
                *experts,
                slice(number, number + 1),
                slice(start - number * ffn, stop - number * ffn),
                columns,
            )
            yield StoredPiece(box, partial(_rows, load, inside))


def _rows(load: Callable[[], torch.Tensor], rows: slice) -> torch.Tensor:
    return load()[..., rows, :].unsqueeze(-3)
