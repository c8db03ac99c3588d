"""Runs whose groups are filtered, by verdicts that stand in the data, on one rank and on several."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.scripted_verdicts import write_data
from support.worlds import SHORT, metrics, run, samples

# Four groups of four, in two updates of two groups.
JOB = [*SHORT, "actor_rollout.ppo_mini_batch_size=8", "actor_rollout.lr_decay_style=linear"]


def rows_by_position(folder: Path, step: int, column: str) -> list[set]:
    """What the rows of each group say in a column."""
    found: dict[int, set] = {}
    for row in samples(folder, step):
        found.setdefault(row["position"], set()).add(row[column])
    return [found[position] for position in sorted(found)]


@pytest.mark.parametrize("size", [1, 4])
def test_skipped_groups_are_drawn_scored_and_written_but_not_learnt_from(tiny, tmp_path, size):
    """The first step has groups of 4, 2, 0 and 1 right answers, the second none that teaches."""
    data = write_data(tmp_path / "data.parquet", tiny, [4, 2, 0, 1, 4, 0, 0, 4])
    folder = run(tmp_path / "run", size, "tiny", [*JOB, *data, "algorithm.equal_groups=skip"])
    first, second = metrics(folder)
    counts = ("drawn", "kept", "all_right", "all_wrong", "failed")
    assert [first[f"groups/{key}"] for key in counts] == [4, 2, 1, 1, 0]
    assert first["reward/mean"] == 7 / 16
    assert first["updates"] == 2 and first["updates/skipped"] == 0
    assert rows_by_position(folder, 1, "dropped") == [{"equal"}, {""}, {"equal"}, {""}]
    advantages = rows_by_position(folder, 1, "advantage")
    assert advantages[0] == advantages[2] == {None} and None not in advantages[1] | advantages[3]
    assert [second[f"groups/{key}"] for key in counts] == [4, 0, 2, 2, 0]
    assert second["updates"] == 0 and second["updates/skipped"] == 2
    assert "grad_norm" not in second and second["publish/bytes"] > 0


def test_the_schedule_of_the_learning_rate_counts_steps_that_were_taken(tiny, tmp_path):
    data = write_data(tmp_path / "data.parquet", tiny, [4, 4, 2, 2, 1, 1, 1, 1])
    keep, skip = (
        run(tmp_path / way, 1, "tiny", [*JOB, *data, f"algorithm.equal_groups={way}"])
        for way in ("keep", "skip")
    )
    # 4 updates of the run, linear to 0: the last of them is the third that is taken.
    rates = [[line["lr"] for line in metrics(folder)] for folder in (keep, skip)]
    assert rates[0] == pytest.approx([5e-4 * 3 / 5, 5e-4 * 1 / 5])
    assert rates[1] == pytest.approx([5e-4 * 4 / 5, 5e-4 * 2 / 5])


def test_groups_outside_the_band_of_accuracy_are_passed_over(tiny, tmp_path):
    data = write_data(tmp_path / "data.parquet", tiny, [4, 2, 1, -1] * 2)
    keys = ["algorithm.keep_accuracy=[0.3, 0.8]", "reward.max_failure_rate=1"]
    folder = run(tmp_path / "run", 4, "tiny", [*JOB, *data, *keys, "training.train_iters=1"])
    [line] = metrics(folder)
    assert (line["groups/kept"], line["groups/failed"], line["updates"]) == (2, 1, 2)
    assert rows_by_position(folder, 1, "dropped") == [{"accuracy"}, {""}, {"accuracy"}, {""}]


@pytest.mark.parametrize("size", [1, 4])
def test_a_step_whose_responses_are_all_cut_takes_no_update_if_they_are_masked(
    tiny, tmp_path, size
):
    data = write_data(tmp_path / "data.parquet", tiny, [2] * 8)
    keys = ["algorithm.mask_truncated=true", "training.seq_length=33"]
    folder = run(tmp_path / "run", size, "tiny", [*JOB, *data, *keys])
    for step, line in enumerate(metrics(folder), start=1):
        assert line["response_truncated"] == 1 and line["groups/kept"] == 0
        assert (line["updates"], line["updates/skipped"]) == (0, 2)
        assert rows_by_position(folder, step, "dropped") == [{"truncated"}] * 4
