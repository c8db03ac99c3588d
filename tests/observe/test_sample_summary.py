"""What replicas tell of their samples joins to what one would tell of all, and their files to one table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from r1zero.observe.metrics import sample_metrics
from r1zero.observe.sample_log import SampleLog
from r1zero.observe.sample_summary import REASONS, join_summaries, summarize
from r1zero.run_folder.samples import SampleFiles, drop_after, samples_path
from r1zero.types import Batch, Group, Outcome, Prompt, Sample, Score

UNUSED = [range(90, 95), range(98, 100)]
GROUPS = 24
SIZE = 5
FUNCTIONS = ["acc", "length", "runs"]


def group_at(position: int) -> Group:
    """A group with values that add up differently in another order."""
    random = np.random.default_rng(position)
    prompt = Prompt(100 + position, f"<s>{position}?", np.zeros(3 + position, np.int32), "1")
    samples = []
    for _ in range(SIZE):
        length = int(random.integers(1, 40))
        outcome = Outcome(int(random.choice([0, 1, 3, 6])))
        scores = {
            "acc": Score(float(random.choice([0.1, 0.2, 1 / 3])), outcome, f"why {position}"),
            "length": Score(random.normal() * 10.0 ** random.integers(-9, 9), Outcome.GRADED),
        }
        samples.append(
            Sample(
                random.integers(0, 100, length).astype(np.int32),
                np.zeros(length, np.float32),
                bool(random.integers(2)),
                int(random.integers(6, 8)),
                scores,
                reward=float(random.normal()),
                loss_mask=random.integers(0, 2, length).astype(bool),
            )
        )
    if position % 4 == 0:
        for sample in samples:
            sample.reward = 0.5
    return Group(position, prompt, samples, trains=position % 3 != 0)


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    return [group_at(position) for position in range(GROUPS)]


@pytest.mark.parametrize("replicas", [2, 5, GROUPS + 3])
def test_any_number_of_replicas_tells_exactly_the_same(groups: list[Group], replicas: int) -> None:
    """Those of more replicas than groups have no sample."""
    whole = summarize(groups, UNUSED)
    parts = [summarize(groups[replica::replicas], UNUSED) for replica in range(replicas)]
    joined = join_summaries(parts)
    for name in ("reward", "scores", "versions", "unused_ids", "unmasked_tokens"):
        assert getattr(joined, name) == getattr(whole, name)
    assert sample_metrics(joined) == sample_metrics(whole)
    assert joined.reasons.total() <= joined.failed == whole.failed


def test_metrics_are_those_of_the_samples(groups: list[Group]) -> None:
    found = sample_metrics(summarize(groups))
    samples = [sample for group in groups for sample in group.samples]
    lengths = [len(sample.tokens) for sample in samples]
    graded = [sample.scores["length"].value for sample in samples]
    failed = [sample for sample in samples if sample.scores["acc"].outcome is Outcome.TIMEOUT]
    right = [sample for sample in samples if sample.scores["acc"].outcome is Outcome.RIGHT]
    assert found["reward/mean"] == pytest.approx(np.mean([s.reward for s in samples]), rel=1e-12)
    assert found["reward/length"] == pytest.approx(np.mean(graded), rel=1e-12)
    assert found["response_length/mean"] == pytest.approx(np.mean(lengths), rel=1e-12)
    assert found["response_length/max"] == max(lengths)
    assert found["response_truncated"] == np.mean([sample.truncated for sample in samples])
    assert found["reward/failed"] == len(failed)
    assert found["reward/acc/timeout"] == found["reward/failure_rate"] == len(failed) / len(samples)
    assert found["reward/acc/right"] == len(right) / len(samples)
    assert found["reward/equal_groups"] == 6 / GROUPS
    assert "reward/length/right" not in found, "a grade has no verdict"


@pytest.fixture(scope="module")
def of_two_sets(groups: list[Group]) -> list[Group]:
    """The groups at even positions are of the set math, the others of code, which only `runs`
    scores."""
    found = []
    for group in groups:
        is_code = group.position % 2
        prompt = replace(group.prompt, source="code" if is_code else "math")
        samples = [replace(sample) for sample in group.samples]
        if is_code:
            for sample in samples:
                sample.scores = {"runs": replace(sample.scores["acc"], value=float(sample.version))}
        found.append(replace(group, prompt=prompt, samples=samples))
    return found


@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_scores_count_where_a_function_scored_and_sets_are_told_apart(
    of_two_sets: list[Group], replicas: int
) -> None:
    """With two replicas, each has the samples of one set only."""
    judging = ["acc", "runs"]
    parts = [summarize(of_two_sets[at::replicas], UNUSED, judging) for at in range(replicas)]
    found = sample_metrics(join_summaries(parts))
    for source, function in (("math", "acc"), ("code", "runs")):
        samples = []
        for group in of_two_sets:
            if group.prompt.source == source:
                samples += group.samples
        scores = [sample.scores[function] for sample in samples]
        right = np.mean([score.outcome is Outcome.RIGHT for score in scores])
        values = [score.value for score in scores]
        assert found[f"reward/{function}"] == pytest.approx(np.mean(values), rel=1e-12)
        assert found[f"reward/{function}/right"] == found[f"data/{source}/right"] == right
        rewards = [sample.reward for sample in samples]
        assert found[f"data/{source}/reward"] == pytest.approx(np.mean(rewards), rel=1e-12)
        lengths = [len(sample.tokens) for sample in samples]
        assert found[f"data/{source}/response_length"] == pytest.approx(np.mean(lengths), rel=1e-12)
        assert found[f"data/{source}/samples"] == len(samples) == GROUPS * SIZE // 2


def test_what_a_function_did_not_score_is_null_in_the_rows(
    of_two_sets: list[Group], tmp_path: Path
) -> None:
    files = SampleFiles(2, 1, 9)
    write(tmp_path, of_two_sets, files, 3)
    files.show(tmp_path, 3)
    rows = pq.read_table(samples_path(tmp_path, 3)).to_pylist()
    assert len(rows) == GROUPS * SIZE
    for row in rows:
        is_code = row["position"] % 2
        assert row["source"] == ("code" if is_code else "math")
        scored = {name for name in FUNCTIONS if row[f"score/{name}"] is not None}
        assert scored == ({"runs"} if is_code else {"acc", "length"})
        assert scored == {name for name in FUNCTIONS if row[f"outcome/{name}"] is not None}


def test_a_summary_counts_what_the_roles_are_given(groups: list[Group]) -> None:
    found = summarize(groups, UNUSED)
    training = [sample for group in groups if group.trains for sample in group.samples]
    samples = [sample for group in groups for sample in group.samples]
    drawn = np.concatenate([sample.tokens for sample in samples])
    assert found.response_tokens == len(drawn)
    assert found.training_tokens == sum(len(sample.tokens) for sample in training)
    assert found.unmasked_tokens == sum(sample.loss_mask.sum() for sample in training)
    assert found.unused_ids == np.isin(drawn, [90, 91, 92, 93, 94, 98, 99]).sum()
    assert found.prompt_tokens == SIZE * sum(3 + position for position in range(GROUPS))
    assert found.versions == {v: sum(s.version == v for s in samples) for v in (6, 7)}
    assert len(found.reasons) == REASONS < len({s.failure for s in samples if s.failed})


# -- their files ----------------------------------------------------------------------------------


def text_of(tokens: np.ndarray) -> str:
    return " ".join(map(str, tokens))


def write(run: Path, groups: list[Group], files: SampleFiles, step: int) -> np.ndarray:
    """Let all replicas write their rows; returns the advantages."""
    batch = Batch(step, 7, [group.prompt for group in groups], SIZE, SIZE * len(groups))
    advantages = np.random.default_rng(1).normal(size=(len(groups), SIZE))
    advantages[0::2] = np.nan  # with two replicas nobody learns from what the first one drew
    for replica in range(files.replicas):
        log = SampleLog(files, replica, text_of, UNUSED, FUNCTIONS)
        for group in groups[replica :: files.replicas]:
            log.add(batch, [group])
        log.prepare(batch)
        log.write(batch, advantages, run)
        assert log.unwritten is None
    return advantages


@pytest.mark.parametrize("replicas", [1, 2, 3, GROUPS + 1])
def test_the_files_of_all_replicas_are_one_table(
    tmp_path: Path, groups: list[Group], replicas: int
) -> None:
    run = tmp_path / "_hidden" / ".run"
    run.mkdir(parents=True)
    files = SampleFiles(replicas, 1, 9)
    advantages = write(run, groups, files, 3)
    assert not list(run.glob("samples/step*")), "nothing to be seen before all have written"
    files.show(run, 3)
    path = samples_path(run, 3)
    assert path.is_dir() == (replicas > 1) and len(list((run / "samples").iterdir())) == 1
    assert len(pq.read_table(path, columns=["response_length"])) == GROUPS * SIZE
    rows = pq.read_table(path).to_pylist()
    rows.sort(key=lambda row: (row["position"], row["member"]))
    expected = [(group, member) for group in groups for member in range(SIZE)]
    for row, (group, member) in zip(rows, expected, strict=True):
        sample = group.samples[member]
        advantage = advantages[group.position, member]
        assert (row["position"], row["member"]) == (group.position, member)
        assert row["advantage"] == (None if np.isnan(advantage) else advantage)
        assert row["response"] == text_of(sample.tokens) and row["prompt"] == group.prompt.text
        assert row["score/length"] == sample.scores["length"].value
        assert row["outcome/acc"] == sample.scores["acc"].outcome.name.lower()
        assert row["weights_version"] == sample.version and row["failure"] == sample.failure


def test_what_cannot_be_written_is_told_and_leaves_nothing(
    tmp_path: Path, groups: list[Group]
) -> None:
    files = SampleFiles(2, 1, 9)
    write(tmp_path, groups, files, 1)
    files.drop(tmp_path, 1)
    assert list((tmp_path / "samples").iterdir()) == []
    batch = Batch(1, 7, [groups[0].prompt], SIZE, SIZE)
    log = SampleLog(files, 0, text_of, UNUSED, FUNCTIONS)
    log.add(batch, groups[:1])
    log.prepare(batch)
    log.write(batch, np.zeros((1, SIZE)), tmp_path / "taken away")
    assert log.unwritten is not None and "No such file or directory" in log.unwritten
    summary = log.take(batch)
    assert summary is not None and summary.samples == SIZE, "told of all the same"


def test_batches_do_not_mix_while_one_is_generated_and_another_learnt_from(
    groups: list[Group],
) -> None:
    log = SampleLog(SampleFiles(1, 0, 9), 0, text_of, UNUSED, FUNCTIONS)
    first, second = (Batch(step, 7, [groups[0].prompt], SIZE, SIZE) for step in (1, 2))
    log.add(first, groups[:3])
    log.prepare(first)
    log.add(second, groups[3:5])
    log.prepare(second)
    assert log.waiting() == groups[:5]
    assert [log.take(batch) for batch in (first, second)] == [
        summarize(groups[:3], UNUSED),
        summarize(groups[3:5], UNUSED),
    ]
    assert log.waiting() == []


@pytest.mark.parametrize(
    ("interval", "steps"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (0, []), (100, [7])]
)
def test_every_so_many_steps_and_the_last_leave_samples(interval: int, steps: list[int]) -> None:
    files = SampleFiles(1, interval, 7)
    assert [step for step in range(1, 8) if files.due(step)] == steps


def test_going_on_removes_later_steps_whatever_layout_wrote_them(
    tmp_path: Path, groups: list[Group]
) -> None:
    """A start on other ranks finds a folder where it writes a file, and parts of a killed step."""
    for step in (1, 2):
        files = SampleFiles(3, 1, 9)
        write(tmp_path, groups, files, step)
        files.show(tmp_path, step)
    write(tmp_path, groups, files, 3)  # killed before it was shown
    (tmp_path / "samples" / ".step_notes.parquet").touch()
    drop_after(tmp_path, 1)
    kept = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert kept == [".step_notes.parquet", "step_000001.parquet"]
    again = SampleFiles(1, 1, 9)
    for step in (2, 3):
        write(tmp_path, groups, again, step)
        again.show(tmp_path, step)
        assert len(pq.read_table(samples_path(tmp_path, step))) == GROUPS * SIZE
