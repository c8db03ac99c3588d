"""Tail batching in a run: the same samples on every layout, every prompt answered once, exact resume."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from support.worlds import SHORT, metrics, run, samples

STEPS = 6
# Without learning the samples of all steps are the same on every layout.
JOB = [
    *SHORT,
    f"training.train_iters={STEPS}",
    "training.tail_batching=0.5",
    "training.no_shuffle=true",
    "actor_rollout.ppo_mini_batch_size=8",
    "actor_rollout.lr=0",
]
EIGHT = [
    "actor_rollout.num_gpus_for_train=4",
    "actor_rollout.tensor_model_parallel_size=2",
    "actor_rollout.num_gpus_for_infer=3",
    "actor_rollout.infer_tensor_parallel_size=1",
    "resource_pool.actor_rollout=[7]",
    "resource_pool.ref=[1]",
]


def answers(folder: Path, step: int) -> list[tuple]:
    """What a step's rows say, in order."""
    columns = ("prompt_index", "member", "response", "dropped")
    return [tuple(row[column] for column in columns) for row in samples(folder, step)]


def answered(folder: Path) -> Counter[int]:
    """How often each prompt that was drawn was answered in the whole run."""
    counts: Counter[int] = Counter()
    for step in range(1, STEPS + 1):
        for index, member, _, dropped in answers(folder, step):
            counts[index] += dropped == "" and member == 0
    return counts


def drawn(folder: Path) -> Counter[int]:
    """How often each prompt was drawn."""
    steps = range(1, STEPS + 1)
    return Counter(
        index for step in steps for index, member, _, _ in answers(folder, step) if member == 0
    )


@pytest.mark.parametrize(
    "keys",
    [[], ["training.updates=accumulate", "training.staleness=1"]],
    ids=["in order", "ahead"],
)
def test_the_same_samples_on_every_layout_and_every_prompt_once(tiny, tmp_path, keys):
    folders = [
        run(tmp_path / str(size), size, "tiny", [*JOB, *keys, *layout])
        for size, layout in ((1, []), (4, []), (8, EIGHT))
    ]
    one = folders[0]
    for folder in folders:
        for step in range(1, STEPS + 1):
            assert answers(folder, step) == answers(one, step)
    lines = metrics(one)
    short = [line for line in lines if "tail/limit" in line]
    put_off = sum(line["tail/put_off"] for line in short)
    assert put_off, "some groups were put off"
    for line in short:
        assert line["response_length/max"] <= line["tail/limit"]
        assert line["updates"] > 0
    counts = answered(one)
    waiting = [index for index, times in counts.items() if times == 0]
    assert max(counts.values()) == 1, "none twice"
    again = sum(times for times in drawn(one).values()) - len(counts)
    assert again, "some of them were answered in a step of their own"
    assert len(waiting) == put_off - again
    assert sorted(counts) == list(range(len(counts))), "the stream has no gap"


def test_what_was_put_off_is_answered_with_its_own_random_numbers(tiny, tmp_path):
    """Without learning an answer goes on where it was cut: none is drawn anew for being long."""
    folder = run(tmp_path / "run", 1, "tiny", JOB)
    cut: dict[tuple[int, int], str] = {}
    compared = 0
    for step in range(1, STEPS + 1):
        for index, member, response, dropped in answers(folder, step):
            if dropped:
                cut[index, member] = response
            elif (index, member) in cut:
                assert response.startswith(cut[index, member])
                compared += 1
    assert compared >= 8


def test_a_short_step_may_have_more_updates_than_a_whole_one(tiny, tmp_path):
    """One minibatch of four groups; of five drawn, all may end."""
    keys = ["training.tail_batching=0.8", "actor_rollout.ppo_mini_batch_size=16"]
    folder = run(tmp_path / "run", 1, "tiny", [*JOB, *keys, "training.train_iters=8"])
    assert max(line["updates"] for line in metrics(folder)) == 2


def test_a_resumed_run_draws_what_the_whole_one_did(tiny, tmp_path):
    constant = ["actor_rollout.lr_decay_style=constant", "actor_rollout.lr_warmup_iters=0"]
    keys = [*JOB[:-1], *constant, "training.save_interval=3"]  # and learns
    whole = run(tmp_path / "whole", 4, "tiny", keys)
    first = run(tmp_path / "parts", 4, "tiny", [*keys, "training.train_iters=3"])
    second = run(tmp_path / "parts", 4, "tiny", keys)
    assert first == second
    for step in range(1, STEPS + 1):
        assert samples(second, step) == samples(whole, step)
