"""Whole training runs on forked ranks, for tests that compare them."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pyarrow.parquet as pq
from multiproc import DEVICE, run_ranks

from r1zero.config.load import load_config
from r1zero.config.schema import placement
from r1zero.distributed.groups import World
from r1zero.distributed.launch import Launch
from r1zero.preflight.checks import check
from r1zero.trainer import prepare, train


def train_body(rank: int, size: int, store: object, config: str, overrides: list[str]) -> dict:
    """Train as main.py does; returns what tests want to know of this rank."""
    cfg, _ = load_config(config, overrides)
    problems = check(cfg, size, [0] * size)
    assert not problems, problems
    launch = Launch("single", rank, size, 0, (0,) * size, "", 0)
    world = World(launch, placement(cfg, size), DEVICE, timedelta(seconds=120), store)
    train(prepare(cfg, world))
    return {"roles": world.role_names}


def run(
    folder: Path, size: int, config: str, overrides: list[str], timeout_seconds: float = 240.0
) -> Path:
    """Train on `size` ranks into `folder` and return it."""
    run_ranks(
        train_body,
        size,
        config,
        [*overrides, f"output_dir={folder}"],
        timeout_seconds=timeout_seconds,
    )
    return folder


def metrics(folder: Path) -> list[dict[str, float]]:
    """The metrics of each step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def samples(folder: Path, step: int) -> list[dict]:
    """The samples of a step in batch order."""
    rows = pq.read_table(folder / "samples" / f"step_{step:06d}.parquet").to_pylist()
    return sorted(rows, key=lambda row: (row["position"], row["member"]))


def spans(folder: Path, step: int) -> list[tuple[int, str, float, float]]:
    """(rank, name, start, end) of everything recorded in a step."""
    lines = (folder / "logs" / "spans.jsonl").read_text().splitlines()
    return [tuple(span) for span in json.loads(lines[step - 1])["spans"]]
