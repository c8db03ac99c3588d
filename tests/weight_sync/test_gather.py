"""Experts are gathered one by one, and what several ranks write of them is what one would write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.multiproc import run_ranks
from support.publishing import expert_model, held_by, random_model
from support.worlds import make_world

from r1zero.checkpoint import export
from r1zero.distributed.transfer import RoleTransfer
from r1zero.models.params import Shards, num_elements, param_table
from r1zero.weight_sync import gather
from r1zero.weights.save_huggingface import save_hf

SHAPE = expert_model()
SHARD_BYTES = 4_000  # some experts of a layer


def gathering(
    rank: int, size: int, store: object, folder: str, train: tuple[int, int], rest: dict[str, Any]
) -> list[int]:
    """Gather everything on the controller, then export; returns the sizes of what was sent then."""
    world = make_world(rank, size, store, train, **rest)
    full = random_model(SHAPE, torch.float32)
    held = held_by(rank, world.train.span, SHAPE, full)
    got = {spec.name: part for spec, part in gather.gather_tensors(world, SHAPE, held)}
    assert got.keys() == (full.keys() if rank == 0 else set())
    assert all(torch.equal(part, full[name]) for name, part in got.items())

    sizes = []
    isend = gather.isend

    def noted(part: torch.Tensor, *others: object) -> object:
        sizes.append(part.numel())
        return isend(part, *others)

    gather.isend = noted
    for name, alone in ("alone", True), ("together", False):
        target = export.ModelFolder(
            Path(folder) / name, Path(folder) / "source", "float32", shard_bytes=SHARD_BYTES
        )
        assert export.write_model(RoleTransfer(world), SHAPE, held, target, alone) is None
    return sizes


@pytest.mark.parametrize(
    "train, rest",
    [
        ((2, 1), {"ep": 4}),
        ((1, 2), {"cp": 2, "ep": 2, "num_layer_list": (1, 3)}),
    ],
    ids=["TP2 DP2 EP4", "PP2 CP2 EP2, uneven"],
)
def test_experts_are_gathered_and_written_one_by_one(
    tmp_path: Path, train: tuple[int, int], rest: dict[str, Any]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    told = run_ranks(gathering, 4, str(tmp_path), train, rest)
    # Experts of a rank are larger together than any other part of a parameter: gate and up of one
    # are 384 elements, half of a projection of queries, keys and values, or all of it, 512 or 1,024.
    dense = [spec for spec in param_table(SHAPE) if spec.cut != "experts"]
    largest = max(num_elements(spec, Shards(tp=train[0])) for spec in dense)
    assert max(max(sizes) for sizes in told if sizes) <= largest
    full = random_model(SHAPE, torch.float32)
    stream = [(spec, full[spec.name]) for spec in param_table(SHAPE)]
    save_hf(tmp_path / "one", SHAPE, stream, source, "float32", SHARD_BYTES)
    expected = contents(tmp_path / "one")
    assert len(expected) > 10
    assert contents(tmp_path / "alone") == expected
    assert contents(tmp_path / "together") == expected


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
