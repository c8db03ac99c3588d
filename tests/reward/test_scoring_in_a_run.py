"""Scoring in a real world: shaping terms, a custom scorer, and a worker that is killed in
mid-step."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from support.multiproc import run_ranks
from support.worlds import metrics, resolved_run, samples

from r1zero.rollout.interface import EngineListener
from r1zero.trainer import prepare, train
from r1zero.types import Group

CUSTOM = """
def digits(cases):
    if any(case.gold.endswith("7") for case in cases):
        raise ValueError("sevens are unlucky")
    return [case.tokens / case.limit + bool(case.right) for case in cases]
"""
STEPS = 2
NAMES = ["acc", "format", "length", "overlong", "repetition", "mine.digits"]
WEIGHTS = [1, 0.5, 0.25, 1, 1, 0.125]


def train_and_kill(rank: int, size: int, store: object, overrides: list[str]) -> int:
    """Train; kill the worker of each rollout rank's reward executor right after it was given the
    first sample."""
    runtime = prepare(*resolved_run(rank, size, store, "tiny", overrides))
    count = 0
    if runtime.world.rollout.member:
        executor, submit = runtime.reward_manager._executor, runtime.reward_manager.submit
        while not executor.pool.ready:
            executor.poll(0.1)
        [pid] = executor.pool.processes

        def submit_and_kill(group: Group, member: int) -> None:
            nonlocal count
            if count == 0:
                os.kill(pid, signal.SIGSTOP)  # so that the sample is in its hands when it dies
            submit(group, member)
            if count == 0:
                os.kill(pid, signal.SIGKILL)
            count += 1

        poll = runtime.reward_manager.poll
        runtime.engine.listeners[0] = EngineListener(submit_and_kill, poll)
    train(runtime)
    return count


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scoring")
    (out / "mine.py").write_text(CUSTOM)
    overrides = [
        f"training.train_iters={STEPS}",
        "training.eval_data_path=null",
        "reward.workers=1",
        "reward.accuracy.wrong=-0.5",
        "reward.overlong_cache=20",
        "reward.repetition_ngram=3",
        "reward.max_failure_rate=1",
        "actor_rollout.micro_batch_size=8",
        "ref.micro_batch_size=8",
        f"algorithm.verifier_function=[{', '.join(NAMES[:-1])}, '{out}/mine.py:digits']",
        f"algorithm.verifier_weight={WEIGHTS}",
        f"output_dir={out}/run",
    ]
    pool = [
        "resource_pool.colocate=true",
        "resource_pool.actor_rollout=[2]",
        "resource_pool.ref=[]",
    ]
    counts = run_ranks(train_and_kill, 2, [*overrides, *pool])
    assert counts == [64 * STEPS, 64 * STEPS]
    return out / "run"


def test_killed_worker_is_one_counted_outcome_and_the_step_completes(folder: Path) -> None:
    steps = metrics(folder)
    assert len(steps) == STEPS
    rows = samples(folder, 1)
    killed = [row for row in rows if row["outcome/acc"] == "crash"]
    # one for each executor
    assert [row["failure"] for row in killed] == ["acc: its process ended with status -9"] * 2
    assert [row["score/acc"] for row in killed] == [-0.5] * 2
    assert {row["outcome/format"] for row in killed} <= {"right", "wrong"}
    assert steps[0]["reward/acc/crash"] == 2 / 128 and steps[1]["reward/acc/crash"] == 0
    failed = sum(bool(row["failure"]) for row in rows)
    assert steps[0]["reward/failed"] == failed and steps[0]["reward/failure_rate"] == failed / 128


def test_custom_scorer_and_shaping_terms_are_in_rewards_samples_and_metrics(folder: Path) -> None:
    unlucky = 0
    for step in range(1, STEPS + 1):
        for row in samples(folder, step):
            length, right = row["response_length"], row["outcome/acc"] == "right"
            if row["ground_truth"].endswith("7"):
                unlucky += 1
                assert row["outcome/mine.digits"] == "crash" and row["score/mine.digits"] == 0
                assert "sevens are unlucky" in row["failure"] or row["outcome/acc"] == "crash"
            else:
                assert row["score/mine.digits"] == pytest.approx(length / 32 + right)
            assert row["score/overlong"] == pytest.approx(-max(0, length - 12) / 20)
            assert -0.5 <= row["score/length"] <= 0.5 and row["outcome/length"] == "graded"
            parts = [
                weight * row[f"score/{name}"] for name, weight in zip(NAMES, WEIGHTS, strict=True)
            ]
            assert row["reward"] == pytest.approx(sum(parts))
    assert unlucky
    first = metrics(folder)[0]
    assert first["reward/mine.digits/crash"] > 0
    assert "reward/acc/right" in first and "reward/length/right" not in first
