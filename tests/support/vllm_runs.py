"""Samples and whole runs of two engines, native and vllm, to compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from support.multiproc import DEVICE, run_ranks
from support.worlds import metrics
from support.worlds import train_body as whole_run

from r1zero.distributed.groups import Grid, World
from r1zero.models.config import ModelConfig
from r1zero.models.params import ShardIndex, Shards, param_table
from r1zero.rollout.engines import choose_engine
from r1zero.rollout.interface import EngineConfig, EngineSetup, RolloutEngine, Sampling
from r1zero.types import ANY_LENGTH, Batch, Group, Part, Prompt
from r1zero.weights.open import open_weights

BUDGET = 12
END = 2
QUESTIONS = (3, 40, 17)  # tokens of each prompt
SAMPLINGS = (
    Sampling(1.0, 1.0, 0, 11),
    Sampling(0.7, 1.0, 0, 12),
    Sampling(1.0, 0.8, 0, 13),
    Sampling(1.0, 1.0, 5, 14),
)
SHORT_AND_LONG = (range(8), range(8, ANY_LENGTH))  # tokens of the longest response of a group
# Metrics of a step that follow from its samples.
COMPARED = ("loss", "kl", "entropy", "grad_norm", "reward/mean", "response_length/mean")
SIX_DIGITS = 5e-7


def engine_of(name: str, folder: Path, world: World) -> RolloutEngine:
    """An engine on this rank, for the model in a folder."""
    return choose_engine(name).build(engine_setup(name, folder, world.rollout))


def engine_setup(name: str, folder: Path, grid: Grid) -> EngineSetup:
    """What it is built from: fewer rows than samples, and ids that are no tokens."""
    return EngineSetup(
        model_folder=folder,
        shape=ModelConfig.from_folder(folder),
        grid=grid,
        dtype=torch.float32,
        device=DEVICE.torch,
        end_ids=(END,),
        unused=[range(300, 320)],
        config=EngineConfig(
            name=name,
            max_length=128,
            max_response=BUDGET,
            max_cache_tokens=2048,
            max_running=4,
            graphs=None,
        ),
    )


def fill(engine: RolloutEngine, folder: Path, world: World, version: int) -> None:
    """Write the weights of a version: those in the folder, smaller from version to version."""
    target = engine.weights()
    grid = target.layout.grid(world.rollout.span)
    index = ShardIndex.of_rank(grid, world.rank)
    shards = Shards.of_grid(grid)
    shape = ModelConfig.from_folder(folder)
    table = param_table(shape)
    with torch.no_grad():
        stream = open_weights(folder, shape).stream(table, index, shards, torch.float32)
        for spec, param in stream:
            target.write(spec, param * 0.9**version, shards, index)
    target.commit(version)


def drawn(engine: RolloutEngine, version: int) -> list[Group]:
    """Groups of several samplings, each a request of its own: first those of short responses."""
    random = np.random.default_rng(5)
    prompts = [
        Prompt(index, "", random.integers(3, 300, length, dtype=np.int32), "")
        for index, length in enumerate(QUESTIONS)
    ]
    found: list[Group] = []
    for sampling in SAMPLINGS:
        batch = Batch(7, version, prompts, 2, len(prompts) * 2)
        engine.submit(batch, range(len(prompts)), sampling)
        for lengths in SHORT_AND_LONG:
            found += engine.collect(Part(batch.positions, lengths))
    return found


def agree(ours: list[Group], theirs: list[Group]) -> bool:
    """Whether samples are equal, and their log-probs within what other orders of sums make."""
    if [group.position for group in ours] != [group.position for group in theirs]:
        return False
    for mine, other in zip(ours, theirs, strict=True):
        for one, two in zip(mine.samples, other.samples, strict=True):
            if one.tokens.tolist() != two.tokens.tolist() or one.truncated != two.truncated:
                return False
            if np.abs(one.logprobs - two.logprobs).max() > 1e-4:
                return False
    return True


def train_body(rank: int, size: int, store: object, overrides: list[str]) -> dict:
    """Train as main.py does."""
    return whole_run(rank, size, store, "tiny", overrides)


def same_runs(
    body: Callable[..., dict], model: Path, folder: Path, steps: int, more: Sequence[str] = ()
) -> list[list[dict[str, float]]]:
    """Run both engines on 4 ranks (1 train, 2 rollout with TP 2, 1 ref) and compare samples and
    metrics of every step, and the samples of evaluations; returns the metrics of both."""
    found = []
    for name in ("native", "vllm"):
        overrides = [
            *more,
            f"actor_rollout.engine={name}",
            f"actor_rollout.load={model}",
            f"ref.load={model}",
            "actor_rollout.infer_tensor_parallel_size=2",
            f"training.train_iters={steps}",
            "training.report_interval=0",
            "training.publish_check_interval=1",
            f"output_dir={folder / name}",
        ]
        run_ranks(body, 4, overrides)
        found.append(metrics(folder / name))
    for path in sorted((folder / "native").rglob("*.parquet")):
        same_responses(path, folder / "vllm" / path.relative_to(folder / "native"))
    for native, vllm in zip(*found, strict=True):
        for key in COMPARED:
            assert math.isclose(native[key], vllm[key], rel_tol=SIX_DIGITS), key
    return found


def same_responses(native: Path, vllm: Path) -> None:
    """Every response in two files of samples is the same, whether trained on or evaluated."""
    columns = ["position", "member", "response", "reward"]
    ours, theirs = (pq.read_table(path, columns=columns) for path in (native, vllm))
    assert len(ours) and ours.equals(theirs), native
