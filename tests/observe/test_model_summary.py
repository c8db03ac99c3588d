"""What is told of a reward model: its mean, its spread within groups, what it has in common with rules."""

from __future__ import annotations

import math

import numpy as np
import pytest

from r1zero.observe.metrics import sample_metrics
from r1zero.observe.sample_summary import join_summaries, summarize
from r1zero.observe.samples import sample_table
from r1zero.scores import MODEL, Outcome, Score
from r1zero.types import Group, Prompt, Sample, SampleSummary

RIGHT = Score(1.0, Outcome.RIGHT)
WRONG = Score(-1.0, Outcome.WRONG)
LATE = Score(-1.0, Outcome.TIMEOUT, "no score within 1 s")
UNREAD = Score(math.nan, Outcome.TOO_LONG, "600 tokens, and the reward model has 512 positions")


def graded(value: float) -> Score:
    return Score(value, Outcome.GRADED)


def sample(length: int, **scores: Score) -> Sample:
    tokens = np.zeros(length, np.int32)
    return Sample(tokens, np.zeros(length, np.float32), False, 0, scores, reward=0.0)


def group(position: int, *samples: Sample) -> Group:
    return Group(position, Prompt(position, "", np.zeros(1, np.int32), ""), list(samples))


def by_hand() -> list[Group]:
    """Two groups that the model reads but for one sample, and one that it has no part in."""
    return [
        group(
            0,
            sample(1, acc=WRONG, format=RIGHT, model=graded(1.0)),
            sample(1, acc=RIGHT, format=RIGHT, model=graded(2.0)),
            sample(1, acc=RIGHT, format=RIGHT, model=graded(3.0)),
        ),
        group(
            1,
            sample(2, acc=WRONG, format=RIGHT, model=graded(2.0)),
            sample(2, acc=RIGHT, format=RIGHT, model=graded(4.0)),
            sample(2, acc=LATE, format=RIGHT, model=graded(9.0)),
            sample(50, acc=WRONG, format=RIGHT, model=UNREAD),
        ),
        group(2, sample(70, acc=WRONG, format=WRONG), sample(70, acc=RIGHT, format=RIGHT)),
    ]


def test_numbers_worked_by_hand() -> None:
    found = sample_metrics(summarize(by_hand()))
    assert found["reward/model"] == (1 + 2 + 3 + 2 + 4 + 9) / 6
    # 1, 2, 3 deviate by 1; 2, 4, 9 by the root of (9 + 1 + 16) / 2
    assert found["reward/model/std"] == pytest.approx((1 + math.sqrt(13)) / 2, rel=1e-15)
    # Without the late one: n 5, sums 12 and 1, of squares 34 and 5, of products 6.
    expected = (5 * 6 - 12 * 1) / math.sqrt((5 * 34 - 12 * 12) * (5 * 5 - 1 * 1))
    assert found["reward/model/correlation/acc"] == pytest.approx(expected, rel=1e-15)
    # With lengths 1, 1, 1, 2, 2, 2: n 6, sums 21 and 9, of squares 115 and 15, of products 36.
    expected = (6 * 36 - 21 * 9) / math.sqrt((6 * 115 - 21 * 21) * (6 * 15 - 9 * 9))
    assert found["reward/model/length_correlation"] == pytest.approx(expected, rel=1e-15)
    assert "reward/model/correlation/format" not in found, "the same for all that the model read"
    assert found["reward/model/too_long"] == 1 / 7
    assert found["reward/failed"] == 2, "the late one and the one too long"
    others = {"reward/model/right", "reward/model/timeout", "reward/acc/too_long"}
    assert not others & found.keys()


def test_a_run_without_a_reward_model_has_none_of_its_keys() -> None:
    found = sample_metrics(summarize(by_hand()[2:]))
    assert found["reward/acc"] == 0 and not [key for key in found if key.startswith("reward/model")]


def test_what_the_model_could_not_read_at_all_has_a_share_and_no_mean() -> None:
    unread = [group(0, sample(5, acc=RIGHT, model=UNREAD), sample(6, acc=WRONG, model=UNREAD))]
    found = sample_metrics(summarize(unread))
    assert [key for key in found if key.startswith("reward/model")] == ["reward/model/too_long"]
    assert found["reward/model/too_long"] == 1


def test_a_rule_that_a_failed_score_belongs_to_keeps_its_usual_keys() -> None:
    long = Score(-1.0, Outcome.TOO_LONG)
    found = sample_metrics(summarize([group(0, sample(3, acc=LATE), sample(3, acc=long))]))
    shares = [found[f"reward/acc/{kind}"] for kind in ("timeout", "crash", "too_long")]
    assert shares == [0.5, 0.0, 0.5]


@pytest.mark.parametrize("value", [1e200, 1e-200, 0.1])
def test_the_size_of_the_values_makes_no_difference(value: float) -> None:
    steps = [-1.0, 0.5, 1.0]
    samples = [sample(1, acc=graded(-each), model=graded(value * each)) for each in steps]
    found = sample_metrics(summarize([group(0, *samples)]))
    assert found["reward/model/correlation/acc"] == pytest.approx(-1.0, abs=1e-12)
    same = [sample(1, acc=graded(each), model=graded(value)) for each in steps]
    found = sample_metrics(summarize([group(0, *same)]))
    assert found["reward/model/std"] == 0 and "reward/model/correlation/acc" not in found


def drawn(position: int) -> Group:
    """A group with values whose sum depends on their order when it is rounded."""
    random = np.random.default_rng(position)
    samples = []
    for _ in range(5):
        model = graded(float(random.normal() * 10.0 ** random.integers(-9, 9)))
        scores = {"acc": RIGHT if random.random() < 0.5 else WRONG, "even": graded(0.1)}
        if position % 4:
            scores[MODEL] = UNREAD if random.random() < 0.2 else model
        if position % 3:
            scores["mine"] = graded(float(random.normal()))
        samples.append(sample(int(random.integers(1, 40)), **scores))
    return group(position, *samples)


@pytest.mark.parametrize("replicas", [2, 5, 24])
def test_any_number_of_replicas_tells_exactly_the_same(replicas: int) -> None:
    """With 24 replicas for 20 groups, some have none, and some none that the model read."""
    groups = [drawn(position) for position in range(20)]
    whole = summarize(groups)
    parts = [summarize(groups[replica::replicas]) for replica in range(replicas)]
    for order in (parts, parts[::-1]):
        joined = join_summaries(order)
        assert joined.model == whole.model and joined.scores == whole.scores
        assert sample_metrics(joined) == sample_metrics(whole)
    assert_as_numpy(groups, whole)


def assert_as_numpy(groups: list[Group], whole: SampleSummary) -> None:
    found = sample_metrics(whole)
    read = []
    deviations = []
    for each in groups:
        mine = [
            sample
            for sample in each.samples
            if MODEL in sample.scores and sample.scores[MODEL].outcome is Outcome.GRADED
        ]
        read += mine
        if len(mine) > 1:
            deviations.append(np.std([sample.scores[MODEL].value for sample in mine], ddof=1))
    assert found["reward/model/std"] == pytest.approx(np.mean(deviations), rel=1e-12)
    values = [sample.scores[MODEL].value for sample in read]
    assert found["reward/model"] == pytest.approx(np.mean(values), rel=1e-12)
    both = [sample for sample in read if "mine" in sample.scores]
    assert 0 < len(both) < len(read)
    mine = [[sample.scores[name].value for name in (MODEL, "mine")] for sample in both]
    expected = np.corrcoef(np.array(mine).T)[0, 1]
    assert found["reward/model/correlation/mine"] == pytest.approx(expected, rel=1e-9)


def test_samples_have_the_model_s_raw_value_and_outcome() -> None:
    table = sample_table(by_hand(), str, ["acc", "format", MODEL])
    values = table["score/model"].to_pylist()
    assert values[:6] == [1.0, 2.0, 3.0, 2.0, 4.0, 9.0]
    assert math.isnan(values[6]) and values[7:] == [None, None]
    outcomes = table["outcome/model"].to_pylist()
    assert outcomes == ["graded"] * 6 + ["too_long", None, None]
    assert table["failure"][6].as_py().startswith("model: 600 tokens")


def test_scores_of_what_is_named_no_more_are_left_out() -> None:
    """A checkpoint may hold them: files of all replicas have the same columns."""
    assert "score/model" not in sample_table(by_hand(), str, ["acc", "format"]).column_names
