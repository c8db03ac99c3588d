"""Worlds of forked ranks: whole training runs for tests that compare them, and the parts of one."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pyarrow.parquet as pq
from support.multiproc import DEVICE, run_ranks
from support.patience import LONG

from r1zero.distributed.groups import World
from r1zero.distributed.launch import Launch
from r1zero.distributed.placement import RoleSize, place
from r1zero.preflight.found import look
from r1zero.preflight.resolve import load_config
from r1zero.preflight.run import Run, complete, resolve
from r1zero.trainer import prepare, train


def train_body(rank: int, size: int, store: object, config: str, overrides: list[str]) -> dict:
    """Train as main.py does; returns what tests want to know of this rank."""
    run, world = resolved_run(rank, size, store, config, overrides)
    train(prepare(run, world))
    return {"roles": world.role_names}


def resolved_run(
    rank: int, size: int, store: object, config: str, overrides: list[str]
) -> tuple[Run, World]:
    """A run as main.py resolves and checks it, and its world on one node."""
    run = resolved(size, config, overrides)
    world = world_of(run, rank, size, store)
    world.barrier()  # all have looked at the run folder before one takes it
    return run, world


def resolved(size: int, config: str, overrides: list[str]) -> Run:
    """A run of so many ranks on one node, as main.py resolves and checks it."""
    cfg, warnings = load_config(config, overrides)
    return resolve(cfg, warnings, size, [0] * size)


def world_of(run: Run, rank: int, size: int, store: object) -> World:
    """The world of a run on one node."""
    launch = Launch("single", rank, size, 0, (0,) * size, "", 0)
    return World(launch, run.placement, DEVICE, timedelta(seconds=LONG), store)


def resolved_body(rank: int, size: int, store: object, run: Run) -> None:
    """Train what is resolved."""
    train(prepare(run, world_of(run, rank, size, store)))


def run(
    folder: Path, size: int, config: str, overrides: list[str], timeout_seconds: float = LONG
) -> Path:
    """Train on `size` ranks into `folder` and return it. BadInput for what does not resolve.

    That is done once, before the ranks are forked.
    """
    run = resolved(size, config, [*overrides, f"output_dir={folder}"])
    run_ranks(resolved_body, size, run, timeout_seconds=timeout_seconds)
    return folder


def metrics(folder: Path) -> list[dict[str, float]]:
    """The metrics of each step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def samples(folder: Path, step: int) -> list[dict]:
    """The samples of a step in batch order; of several rollout replicas a folder of files."""
    rows = pq.read_table(folder / "samples" / f"step_{step:06d}.parquet").to_pylist()
    return sorted(rows, key=lambda row: (row["position"], row["member"]))


def spans(folder: Path, step: int) -> list[tuple[int, str, float, float]]:
    """(rank, name, start, end) of everything recorded in a step."""
    lines = (folder / "logs" / "spans.jsonl").read_text().splitlines()
    return [tuple(span) for span in json.loads(lines[step - 1])["spans"]]


QUICK = [
    "training.train_iters=20",
    "training.eval_data_path=null",
    "training.report_interval=0",
    "training.publish_check_interval=1",
]

# Two steps of 16 samples, without evaluation.
SHORT = [
    "training.train_iters=2",
    "training.global_batch_size=4",
    "actor_rollout.ppo_mini_batch_size=16",
    "actor_rollout.n_samples_per_prompt=4",
    "actor_rollout.micro_batch_size=4",
    "ref.micro_batch_size=4",
    "training.eval_data_path=null",
    "reward.workers=1",
]


def make_runtime(store, folder, *overrides, rank=0, size=1):
    """What a rank of a run of the tiny model is made of, before its first step."""
    cfg, _ = load_config("tiny", [*QUICK, f"output_dir={folder}", *overrides])
    launch = Launch("single", rank, size, 0, (0,) * size, "", 0)
    run = complete(look(cfg, size))
    return prepare(run, World(launch, run.placement, DEVICE, timedelta(seconds=LONG), store))


def make_world(rank, size, store, train, rollout=None, ref=None, rollout_ep=1, **layout):
    """A colocated world: `train` is (TP, PP), `layout` the rest of its RoleSize; rollout and ref follow
    with TP, and rollout with EP."""
    placement = place(
        {
            "train": RoleSize(size, *train, **layout),
            "rollout": RoleSize(size, rollout or 1, ep=rollout_ep),
            "ref": RoleSize(size, ref or 1),
        },
        colocate=True,
    )
    launch = Launch("single", rank, size, 0, (0,) * size, "", 0)
    return World(launch, placement, DEVICE, timedelta(seconds=LONG), store)
