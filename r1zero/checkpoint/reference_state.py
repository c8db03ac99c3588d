"""The reference in a checkpoint: all that ref ranks hold, each part once, in the dtype of the run.

    reference/stage_001_tp_00.safetensors    parameters of stage 1, those that TP rank 0 holds
    reference/stage_001_ep_003.safetensors   part 3 of the experts of stage 1

Tensors have Megatron's names with global layer numbers; one that nothing cuts lies with TP rank 0.
Any layout reads what any other wrote, piece by piece. A reference that was never reset is not written:
its start weights are where they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from r1zero.checkpoint.manifest import describe
from r1zero.checkpoint.writing import FileWriting
from r1zero.distributed.groups import Grid
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.params import (
    EMBEDDING,
    CutAxis,
    ParamSpec,
    ShardIndex,
    Shards,
    Stages,
    param_table,
    stage_params,
)
from r1zero.policy.reference import Reference
from r1zero.run_folder.durable import sync, sync_folder
from r1zero.weights.detect import WeightsOnDisk
from r1zero.weights.source import MegatronWeights, StoredPiece, wanted_box

FOLDER = "reference"


def files_of(grid: Grid) -> dict[CutAxis, str]:
    """The files that a ref rank writes, by what cuts the parameters in them.

    Of what TP cuts, the first replica writes, and of its CP ranks the first; of the experts, in each
    stage the first rank that holds a part. With TP 2, DP 4, EP 4 these are the ranks 0 and 1, and 0
    to 3.
    """
    found: dict[CutAxis, str] = {}
    stage = f"stage_{grid.stage:03d}"
    if grid.replica == 0 and grid.cp_index == 0:
        found["tp"] = f"{FOLDER}/{stage}_tp_{grid.tp_index:02d}.safetensors"
    if grid.place_in_stage < grid.span.ep:
        found["experts"] = f"{FOLDER}/{stage}_ep_{grid.expert_index:03d}.safetensors"
    return found


class ReferenceWriting(FileWriting):
    """This rank's part of the reference on its way to disk."""

    def __init__(self, reference: Reference, folder: Path) -> None:
        super().__init__()
        model = reference.model
        grid = model.grid
        files = files_of(grid)
        self._folder = folder
        parameters = model.parameters()
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}  # by file, then by name
        for tensor in _stored_here(model.shape, grid):
            is_cut = tensor.axis is not None
            if tensor.cut in files and (is_cut or grid.tp_index == 0):
                content = self._tensors.setdefault(files[tensor.cut], {})
                content[tensor.name] = parameters[tensor.name].detach()

    def copy(self) -> None:
        """See FileWriting: the next reset changes all of it."""
        for content in self._tensors.values():
            for name, tensor in content.items():
                content[name] = tensor.to("cpu", copy=True)

    def run(self) -> None:
        """See FileWriting."""
        try:
            for name, content in self._tensors.items():
                path = self._folder / name
                path.parent.mkdir(exist_ok=True)
                save_file({name: value.to("cpu") for name, value in content.items()}, path)
                sync(path)
                sync_folder(path.parent)
                self.files[name] = describe(path)
        except (OSError, SafetensorError) as error:  # which covers what the system said
            self.error = str(error)
        self._tensors = {}


def _stored_here(shape: ModelConfig, grid: Grid) -> Iterator[ParamSpec]:
    """What a stage writes: each parameter of the table, and no copy of the embedding."""
    names = {tensor.name for tensor in param_table(shape)}
    for tensor in stage_params(shape, grid.stage, Stages.of(shape.num_layers, grid.span)):
        if tensor.name in names:
            yield tensor


class StoredReference(MegatronWeights):
    """The reference of a checkpoint, to be read by any layout."""

    def __init__(self, checkpoint: Path, shape: ModelConfig) -> None:
        """Open all files. BadInput when one cannot be read or a parameter is missing."""
        folder = checkpoint / FOLDER
        super().__init__(WeightsOnDisk("reference", folder), shape)
        self._files: dict[str, list[safe_open]] = {}  # by parameter, in order of its parts
        try:
            for path in sorted(folder.glob("stage_*.safetensors")):
                file = safe_open(path, framework="pt")
                for name in file.keys():  # noqa: SIM118 - no mapping
                    self._files.setdefault(name, []).append(file)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{folder} cannot be read ({error})") from None
        missing = [spec.name for spec in param_table(shape) if spec.name not in self._files]
        if missing:
            raise BadInput(f"{folder} does not hold the reference: {missing[0]} is missing")

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The types of all tensors, of which there is one."""
        return {self._files[EMBEDDING][0].get_tensor(EMBEDDING).dtype}

    def pieces(self, tensor: ParamSpec) -> list[StoredPiece]:
        """One piece for each rank that wrote a part."""
        files = self._files[tensor.name]
        shards = Shards(tp=len(files), ep=len(files))
        found = []
        for number, file in enumerate(files):
            box = wanted_box(tensor, ShardIndex(tp=number, ep=number), shards)
            sizes = [side.stop - side.start for side in box]
            found.append(StoredPiece(box, partial(_load, file, tensor.name, sizes)))
        return found

    def stores(self, name: str) -> bool:
        """Whether a tensor of this name is stored."""
        return name in self._files


def _load(file: safe_open, name: str, sizes: list[int]) -> torch.Tensor:
    """A stored part, in the shape of its box."""
    return file.get_tensor(name).view(sizes)
