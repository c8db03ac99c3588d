"""Groups that teach nothing are replaced, in rounds: the same ones on every layout, and after a crash."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.multiproc import run_ranks
from support.scripted_verdicts import write_data
from support.worlds import SHORT, metrics, resolved_run, run, samples

from r1zero.trainer import prepare, train
from r1zero.types import Batch

# E8: four groups of four in two updates of two; right answers by position, two rounds in one step.
RIGHT = [4, 2, 0, 1, 3, 4, 1, 2]
DROPPED = ["equal", "", "equal", "", "", "equal", "", "surplus"]
# The next steps draw more at first, by the five of eight that the first kept.
LATER = [2, 4, 4, 0, 0, 4, 1, 3, 4, 4, 4, 2, 3, 2, 4, 0, 1, 1, 4, 2, 3, 3, 0, 2]
JOB = [*SHORT, "actor_rollout.ppo_mini_batch_size=8", "algorithm.equal_groups=replace"]
EIGHT = [
    "actor_rollout.num_gpus_for_train=4",
    "actor_rollout.tensor_model_parallel_size=2",
    "actor_rollout.num_gpus_for_infer=2",
    "actor_rollout.infer_tensor_parallel_size=1",
    "resource_pool.actor_rollout=[6]",
    "resource_pool.ref=[2]",
]
# Of metrics.jsonl, what a clock or the machine decides.
MEASURED = ("time/", "throughput/", "memory/", "publish/gigabytes")


def by_position(folder: Path, step: int, column: str) -> list:
    """What the rows of each group say in a column, in which they agree."""
    found = {}
    for row in samples(folder, step):
        assert found.setdefault(row["position"], row[column]) == row[column]
    assert sorted(found) == list(range(len(found)))
    return [found[position] for position in sorted(found)]


def numbers(folder: Path) -> list[dict[str, float]]:
    """The metrics that must be the same again."""
    return [
        {key: value for key, value in line.items() if not key.startswith(MEASURED)}
        for line in metrics(folder)
    ]


def stop_body(rank: int, size: int, store: object, overrides: list[str], step: int) -> None:
    """Train until the second round of a step has its plan, and fail there."""
    runtime = prepare(*resolved_run(rank, size, store, "tiny", overrides))
    submit = runtime.submit

    def failing(batch: Batch) -> None:
        if (batch.step, batch.round) == (step, 2):
            raise RuntimeError("fails in its second round")
        submit(batch)

    runtime.submit = failing
    train(runtime)


@pytest.mark.parametrize(
    "keys",
    [[], ["training.updates=accumulate", "training.parts=6"]],
    ids=["two updates", "one update"],
)
def test_the_same_groups_train_on_every_layout(tiny, tmp_path, keys):
    """Which response of a group is right follows from the order in which they end, so what is learnt
    is not compared; that of the same samples is in other tests."""
    data = write_data(tmp_path / "data.parquet", tiny, RIGHT + LATER)
    folders = [
        run(tmp_path / str(size), size, "tiny", [*JOB, *data, *keys, *layout])
        for size, layout in ((1, []), (4, []), (8, EIGHT))
    ]
    one = folders[0]
    for folder in folders:
        assert by_position(folder, 1, "dropped") == DROPPED
        first, second = metrics(folder)
        counts = ("drawn", "kept", "rounds", "surplus", "short")
        assert [first[f"groups/{key}"] for key in counts] == [8, 5, 2, 1, 0]
        assert first["reward/mean"] == sum(RIGHT) / 32, "of all that was drawn"
        assert first["updates"] == second["updates"] == (1 if keys else 2)
        # 4 * 8 / 5 prompts, which makes 7, of which 2 are kept; then 2 * 7 / 2
        assert [second[f"groups/{key}"] for key in counts] == [14, 6, 2, 2, 0]
        for row, same in zip(samples(folder, 1), samples(one, 1), strict=True):
            for column in ("prompt", "response", "position", "member"):
                assert row[column] == same[column]
        for step in (1, 2):
            for column in ("prompt_index", "dropped"):
                assert by_position(folder, step, column) == by_position(one, step, column)
    assert by_position(one, 2, "prompt_index") == list(range(8, 22)), "the stream goes on"


def test_a_run_that_fails_in_the_second_round_goes_on_as_if_it_had_not(tiny, tmp_path):
    data = write_data(tmp_path / "data.parquet", tiny, RIGHT + LATER)
    job = [*JOB, *data, "training.train_iters=3", "training.save_interval=1"]
    whole = run(tmp_path / "whole", 4, "tiny", job)
    broken = tmp_path / "broken"
    overrides = [*job, f"output_dir={broken}"]
    with pytest.raises(AssertionError, match="fails in its second round"):
        run_ranks(stop_body, 4, overrides, 2)
    assert len(metrics(broken)) == 1
    run(broken, 4, "tiny", job)
    assert numbers(broken) == numbers(whole)
    for step in (1, 2, 3):
        assert samples(broken, step) == samples(whole, step)


def test_where_nothing_is_ever_kept_the_last_round_ends_the_step(tiny, tmp_path):
    data = write_data(tmp_path / "data.parquet", tiny, [4, 0] * 4)
    keys = ["algorithm.max_rounds=2", "training.global_batch_size=2"]
    folder = run(tmp_path / "run", 4, "tiny", [*JOB, *data, *keys])
    for line, drawn in zip(metrics(folder), (2 + 16, 16 + 16), strict=True):
        assert line["groups/drawn"] == drawn and line["groups/kept"] == 0
        assert (line["groups/rounds"], line["groups/short"]) == (2, 2)
        assert line["updates"] == line["updates/skipped"] == 0
    assert line["weights_version"] == 1, "published as usual"


@pytest.mark.parametrize("keys", [[], ["training.updates=accumulate"]], ids=["minibatches", "one"])
def test_after_the_last_round_a_smaller_minibatch_has_what_there_is(tiny, tmp_path, keys):
    data = write_data(tmp_path / "data.parquet", tiny, [2, 1, 4, 3, 0, 0])
    job = [*JOB, *data, *keys, "algorithm.max_rounds=2", "training.train_iters=1"]
    folder = run(tmp_path / "run", 4, "tiny", job)
    [line] = metrics(folder)
    assert by_position(folder, 1, "dropped") == ["", "", "equal", "", "equal", "equal"]
    assert (line["groups/short"], line["updates"]) == (1, 1 if keys else 2)


def test_without_a_reference_rollout_hands_all_rounds_to_train(tiny, tmp_path):
    """As DAPO does it: no KL, groups replaced, answers that were cut left out of the loss."""
    data = write_data(tmp_path / "data.parquet", tiny, RIGHT)
    keys = [
        "algorithm.kl_ctrl.kl_coef=0",
        "resource_pool.ref=null",
        "algorithm.mask_truncated=true",
        "training.train_iters=1",
    ]
    folder = run(tmp_path / "run", 3, "tiny", [*JOB, *data, *keys])
    [line] = metrics(folder)
    assert by_position(folder, 1, "dropped") == DROPPED
    assert (line["updates"], line["groups/rounds"], line["invariants/broken"]) == (2, 2, 0)
