"""The reference in a checkpoint: every part is written once, and any layout reads it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.publishing import expert_model, held_by, random_model

from r1zero.checkpoint.reference_state import FOLDER, ReferenceWriting, StoredReference, files_of
from r1zero.distributed.groups import Grid
from r1zero.distributed.placement import RankGrid
from r1zero.models.params import ShardIndex, Shards, param_table, shard

SHAPE = expert_model()


def grid_of(span: RankGrid, rank: int) -> Grid:
    index = span.index_of(rank)
    return Grid(
        span,
        member=True,
        tp_index=index["tp"],
        replica=index["dp"],
        stage=index["pp"],
        cp_index=index["cp"],
        place_in_stage=span.place_in_stage(rank),
        expert_index=span.expert_index(rank),
    )


def write(folder: Path, span: RankGrid, full: dict[str, torch.Tensor]) -> list[str]:
    """Write the reference as its ranks do; returns the names of the files."""
    names: list[str] = []
    for rank in span.ranks:
        held = held_by(rank, span, SHAPE, full)
        model = SimpleNamespace(
            grid=grid_of(span, rank), shape=SHAPE, parameters=lambda held=held: held
        )
        writing = ReferenceWriting(SimpleNamespace(model=model), folder)  # type: ignore[arg-type]
        writing.copy()
        writing.run()
        assert writing.error is None
        names += writing.files
    return names


@pytest.mark.parametrize(
    "span, count",
    [
        (RankGrid.of("ref", 3, 4, tp=2, ep=4), 2 + 4),
        (RankGrid.of("ref", 0, 8, tp=2, pp=2, cp=2, ep=2), 2 * (2 + 2)),
        (RankGrid.of("ref", 0, 2), 1 + 1),
    ],
    ids=["TP2 DP2 EP4", "TP2 CP2 PP2 EP2", "DP2"],
)
def test_every_part_is_written_once_and_read_by_any_layout(
    tmp_path: Path, span: RankGrid, count: int
) -> None:
    full = random_model(SHAPE, torch.float32)
    names = write(tmp_path, span, full)
    assert len(names) == len(set(names)) == count
    assert {str(path.relative_to(tmp_path)) for path in (tmp_path / FOLDER).iterdir()} == set(names)
    stored = StoredReference(tmp_path, SHAPE)
    for spec in param_table(SHAPE):
        for shards, index in (
            (Shards(), ShardIndex()),
            (Shards(tp=4, ep=2), ShardIndex(tp=3, ep=1)),
            (Shards(tp=2, ep=8), ShardIndex(tp=1, ep=5)),
        ):
            expected = shard(spec, full[spec.name], index, shards)
            assert torch.equal(stored.read(spec, index, shards), expected), spec.name


def test_ranks_that_hold_copies_write_nothing() -> None:
    span = RankGrid.of("ref", 0, 8, tp=2, ep=2)
    writers = [rank for rank in span.ranks if files_of(grid_of(span, rank))]
    assert writers == [0, 1]
