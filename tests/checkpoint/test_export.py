"""The trained model, written by several ranks side by side, is what one would write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.multiproc import DEVICE, run_ranks
from support.worlds import make_world

from r1zero.checkpoint import export
from r1zero.distributed.transfer import RoleTransfer
from r1zero.models.config import ModelConfig
from r1zero.models.params import FIRST, WHOLE, param_table
from r1zero.policy.megatron import RoleModel
from r1zero.weights.open import open_weights
from r1zero.weights.save_huggingface import save_hf, write

SHARD_BYTES = 40_000
BESIDE = {"r1zero.json": "{}"}
ENDS = (1, 7)
FULL = 3  # the rank whose disk is full


def exporting(
    rank: int, size: int, store: object, model: str, folder: str, layout: tuple[int, int]
) -> tuple[str | None, list[str]]:
    """Export three times; returns what the last one said, and the files that this rank wrote."""
    world = make_world(rank, size, store, layout)
    shape = ModelConfig.from_folder(model)
    role = RoleModel(shape, world.train, DEVICE, torch.float32, 128, False, False, 1)
    role.load(model)
    wrote: list[str] = []

    def save_to(name: str, alone: bool = False) -> str | None:
        target = export.ModelFolder(
            Path(folder) / name, Path(model), "float32", BESIDE, ENDS, SHARD_BYTES
        )
        return export.write_model(RoleTransfer(world), shape, role.parameters(), target, alone)

    def noted(partial: Path, files: list, stream: Iterator) -> None:
        wrote.extend(file.name for file in files)
        write(partial, files, stream)

    def full(partial: Path, files: list, stream: Iterator) -> None:
        next(stream)  # some of it was written
        raise OSError(28, "No space left on device")

    assert save_to("alone", alone=True) is None
    export.write = noted
    assert save_to("together") is None
    export.write = full if rank == FULL else write
    return save_to("full"), wrote


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["TP2 DP2", "PP2 DP2"])
def test_several_ranks_write_the_bytes_that_one_writes(tiny, tmp_path, layout):
    model = tiny / "model"
    told = run_ranks(exporting, 4, str(model), str(tmp_path), layout)
    shape = ModelConfig.from_folder(model)
    stream = open_weights(model, shape).stream(param_table(shape), FIRST, WHOLE, torch.float32)
    save_hf(tmp_path / "one", shape, stream, model, "float32", SHARD_BYTES, BESIDE, ENDS)
    expected = contents(tmp_path / "one")
    assert contents(tmp_path / "together") == expected
    assert contents(tmp_path / "alone") == expected

    wrote = [name for _, names in told for name in names]
    assert all(names for _, names in told), "every rank wrote a file"
    assert sorted(wrote) == sorted(name for name in expected if name.endswith(".safetensors"))

    assert {said for said, _ in told} == {"No space left on device"}
    assert not (tmp_path / "full").exists() and not (tmp_path / ".full.partial").exists()
