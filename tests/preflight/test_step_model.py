"""The model of the step against steps worked out on paper, and against what must hold of any."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from r1zero.distributed.placement import Placement, RoleSize, place
from r1zero.preflight.step_model import (
    Decoding,
    Job,
    LogNormal,
    Measured,
    Rates,
    plan,
    play,
    predict,
)
from r1zero.types import ANY_LENGTH, Part

RATES = Rates(
    decode_step=1.0,
    decode_row=0.5,
    prefill=0.0,
    ref=0.4,
    learn=0.6,
    look=0.2,
    optimizer=1.0,
    publish=2.0,
    source="made up",
)
JOB = Job(prompts=4, group_size=1, minibatch_size=2, prompt_tokens=0, longest=100)
SHORT_AND_LONG = [Part(range(4), range(4)), Part(range(4), range(4, ANY_LENGTH))]


def world(train: int = 1, rollout: int = 2, ref: int = 1, pp: int = 1) -> Placement:
    sizes = {"train": RoleSize(train, pp=pp), "rollout": RoleSize(rollout), "ref": RoleSize(ref)}
    return place(sizes, colocate=False)


def column(*lengths: int) -> np.ndarray:
    """Groups of one response."""
    return np.array(lengths)[:, None]


# On paper. Four groups of 2, 3, 8 and 5 tokens, the even positions on rollout replica 0:
#
#   replica 0, rows of 2 and 8: a decode step takes 2 s while both run, then 1.5 s. 4 s after 2
#   steps, 7 s after 4, 13 s after 8. Part 0 (up to 3 tokens) is known when the long row has 4: 7 s.
#   replica 1, rows of 3 and 5: 6 s after 3 steps, 7.5 s after 4, 9 s after 5. Part 0 at 7.5 s.
#
#   ref      part 0, 5 tokens:   7.5 s  + 2 s   -> 9.5 s     part 1, 13 tokens: 13 s + 5.2 s -> 18.2 s
#   train    part 0:             9.5 s  + 3 s   -> 12.5 s    part 1: 18.2 s + 7.8 s + optimizer
#
# and 2 s of publishing.
BY_HAND = column(2, 3, 8, 5)


def test_a_step_with_one_accumulated_update() -> None:
    step = play(world(), replace(JOB, updates="accumulate"), RATES, BY_HAND, SHORT_AND_LONG)
    assert step.seconds == pytest.approx(18.2 + 7.8 + 1 + 2)
    assert step.busy["rollout"] == pytest.approx((13 + 9) / 2 + 2)
    assert step.busy["ref"] == pytest.approx(2 + 5.2)
    assert step.busy["train"] == pytest.approx(3 + 7.8 + 1 + 2)
    assert step.tokens_per_second_per_rank == pytest.approx(18 / 29 / 4)


def test_a_step_with_an_update_for_each_minibatch() -> None:
    """The second minibatch looks back at its old log-probs: 13 tokens of 0.2 s."""
    step = play(world(), JOB, RATES, BY_HAND, SHORT_AND_LONG)
    assert step.seconds == pytest.approx(18.2 + 7.8 + 2.6 + 1 + 2)
    noted = play(world(), replace(JOB, old_logprobs="rollout"), RATES, BY_HAND, SHORT_AND_LONG)
    assert noted.seconds == pytest.approx(18.2 + 7.8 + 1 + 2)


def test_a_minibatch_with_a_long_response_waits_for_it() -> None:
    """With 8 tokens in the first minibatch, both are learnt from after the last part: replica 0 has
    2 and 3, replica 1 has 8 and 5, which take 10 s for 5 steps and 14.5 s for 8."""
    step = play(world(), JOB, RATES, column(2, 8, 3, 5), SHORT_AND_LONG)
    looked = 14.5 + 13 * 0.4
    assert step.seconds == pytest.approx(looked + 10 * 0.6 + 1 + 8 * 0.8 + 1 + 2)


def test_with_staleness_learning_lies_beside_generation() -> None:
    job = replace(JOB, staleness=1)
    step = play(world(), job, RATES, BY_HAND, SHORT_AND_LONG)
    assert step.seconds == pytest.approx(18.2 + 2)
    slow = play(world(), job, replace(RATES, learn=6.0), BY_HAND, SHORT_AND_LONG)
    assert slow.seconds == pytest.approx(18 * 6 + 13 * 0.2 + 2 * 1 + 2)


def test_roles_on_the_same_ranks_take_turns() -> None:
    placed = place({role: RoleSize(1) for role in ("train", "rollout", "ref")}, colocate=True)
    everything = [Part(range(4), range(ANY_LENGTH))]
    step = play(placed, replace(JOB, updates="accumulate"), RATES, BY_HAND, everything)
    # Four rows: 2 steps of 3 s, 1 of 2.5 s, 2 of 2 s, 3 of 1.5 s.
    decoding = 6 + 2.5 + 4 + 4.5
    assert step.seconds == pytest.approx(decoding + 18 * 0.4 + 18 * 0.6 + 1 + 2)


def test_a_world_without_a_reference_hands_over_at_once() -> None:
    placed = place({"train": RoleSize(1), "rollout": RoleSize(2)}, colocate=False)
    step = play(placed, replace(JOB, updates="accumulate"), RATES, BY_HAND, SHORT_AND_LONG)
    assert step.seconds == pytest.approx(13 + 7.8 + 1 + 2)
    assert step.busy.keys() == {"train", "rollout"}


def test_ref_replicas_share_a_part_and_the_slower_decides() -> None:
    """Replica 0 has the groups of 2 and 8 tokens, replica 1 those of 3 and 5."""
    step = play(world(ref=2), replace(JOB, updates="accumulate"), RATES, BY_HAND, SHORT_AND_LONG)
    assert step.seconds == pytest.approx(13 + 8 * 0.4 + 7.8 + 1 + 2)
    assert step.busy["ref"] == pytest.approx(18 * 0.4 / 2)


def test_further_epochs_come_last_and_look_at_nothing() -> None:
    once = play(world(), JOB, RATES, BY_HAND, SHORT_AND_LONG)
    twice = play(world(), replace(JOB, epochs=2), RATES, BY_HAND, SHORT_AND_LONG)
    assert twice.seconds - once.seconds == pytest.approx(18 * 0.6 + 2 * 1)


def test_a_pipeline_fills_and_drains_for_every_part() -> None:
    """Three stages, samples one by one: 4 microbatches take as long as 6, and 2 as long as 4."""
    whole = [Part(range(4), range(ANY_LENGTH))]
    job = replace(JOB, updates="accumulate")
    rates = replace(RATES, optimizer=0.0, publish=0.0)
    placed = world(train=3, pp=3)
    assert play(placed, job, rates, BY_HAND, whole).busy["train"] == pytest.approx(10.8 * 6 / 4)
    halves = play(placed, job, rates, BY_HAND, SHORT_AND_LONG)
    assert halves.busy["train"] == pytest.approx((3 + 7.8) * 4 / 2)


def test_rows_join_as_others_end() -> None:
    """Two rows at a time, a second a step: those of 3 and 2 tokens begin, that of 4 after 2 s."""
    job = replace(JOB, max_running=2)
    decoding = Decoding(column(3, 2, 4), job, replace(RATES, decode_row=0.0))
    assert decoding.known(ANY_LENGTH).tolist() == [3, 2, 6]
    assert decoding.known(3).tolist() == [3, 2, 5]  # the last has 3 tokens one second earlier


def test_a_prompt_is_prefilled_once_for_its_group() -> None:
    job = replace(JOB, group_size=2, prompt_tokens=10)
    decoding = Decoding(np.array([[3, 2], [1, 1]]), job, replace(RATES, prefill=0.1))
    # Two prompts, a second each; then 1 step of 4 rows, 1 of 2, 1 of 1.
    assert decoding.known(ANY_LENGTH).tolist() == pytest.approx([2 + 3 + 2 + 1.5, 2 + 3])


def test_a_group_is_known_to_be_longer_by_its_longest_row() -> None:
    decoding = Decoding(np.array([[9, 2]]), replace(JOB, group_size=2), RATES)
    assert decoding.known(4).tolist() == pytest.approx([2 * 2 + 2 * 1.5])


# -- what must hold of any ------------------------------------------------------------------------


def test_parts_are_planned_from_the_step_before() -> None:
    """Four groups of one response, the longest of 9 tokens, so the first of two parts ends at 4."""
    job = replace(JOB, parts=2, updates="accumulate")
    rows, parts = plan(job, 2, column(9, 1, 3, 5))
    assert rows > 100 and [part.lengths.start for part in parts] == [0, 5]
    # 10 tokens hold 2 responses of 4 or 5 tokens: as many blocks as the parts allow.
    rows, parts = plan(replace(job, cache_tokens=10), 1, column(9, 1, 3, 5))
    halves = [range(2), range(2, 4)]
    assert rows == 2 and [part.positions for part in parts] == halves
    # So do minibatches that have updates of their own.
    rows, parts = plan(replace(job, updates="per_minibatch"), 2, column(9, 1, 3, 5))
    assert rows > 100 and [part.positions for part in parts] == halves


SEVEN_B = place(
    {"train": RoleSize(8, 2, 4), "rollout": RoleSize(6, 2), "ref": RoleSize(2, 2)}, colocate=False
)
SEED_JOB = Job(
    prompts=120,
    group_size=4,
    minibatch_size=60,
    prompt_tokens=200,
    longest=2048,
    microbatch=2,
    ref_microbatch=4,
)
LENGTHS = LogNormal(700, 0.7, 2048)
# Of Qwen2.5-7B on TP2 and PP4, as docs/scale.md guesses them.
GUESSED = Rates(
    decode_step=0.019,
    decode_row=5.7e-5,
    prefill=5.8e-5,
    ref=5.8e-5,
    learn=6.7e-5,
    look=1.4e-5,
    optimizer=0.4,
    publish=0.5,
    source="made up",
)


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("updates", ["per_minibatch", "accumulate"])
@pytest.mark.parametrize("order", ["drawn", "expected_length"])
def test_nobody_works_longer_than_the_step(updates: str, order: str, staleness: int) -> None:
    job = replace(SEED_JOB, updates=updates, minibatch_order=order, staleness=staleness)
    step = predict(SEVEN_B, job, GUESSED, LENGTHS)
    for role, busy in step.busy.items():
        assert 0 < busy <= step.seconds
        assert busy + step.idle(role) * step.seconds == pytest.approx(step.seconds)


def test_slower_work_and_fewer_replicas_never_make_a_step_shorter() -> None:
    base = predict(SEVEN_B, SEED_JOB, GUESSED, LENGTHS).seconds
    for rate in ("decode_step", "decode_row", "prefill", "ref", "learn", "look", "publish"):
        slower = replace(GUESSED, **{rate: 1.5 * getattr(GUESSED, rate)})
        assert predict(SEVEN_B, SEED_JOB, slower, LENGTHS).seconds > base, rate
    sizes = {"train": RoleSize(8, 2, 4), "rollout": RoleSize(2, 2), "ref": RoleSize(2, 2)}
    assert predict(place(sizes, False), SEED_JOB, GUESSED, LENGTHS).seconds > base


def test_the_order_of_the_options() -> None:
    """What is trusted of the model: as it is < minibatches by length < one update, or one step
    off, which are alike."""
    seconds = [
        predict(SEVEN_B, replace(SEED_JOB, **changes), GUESSED, LENGTHS).seconds
        for changes in (
            {"parts": 1},
            {},
            {"minibatch_order": "expected_length"},
            {"updates": "accumulate"},
        )
    ]
    assert all(1.1 * faster < slower for slower, faster in pairwise(seconds))
    one_off = predict(SEVEN_B, replace(SEED_JOB, staleness=1), GUESSED, LENGTHS).seconds
    assert 0.75 < one_off / seconds[-1] < 1.1


def test_lengths_are_those_that_were_asked_for() -> None:
    rng = np.random.default_rng(0)
    drawn = LogNormal(700, 0.7, 10**6).draw(20_000, 4, rng)
    assert drawn.mean() == pytest.approx(700, rel=0.03)
    assert np.log(drawn).std() == pytest.approx(0.7, rel=0.02)
    between = np.log(drawn).mean(axis=1).std() ** 2  # 0.8 between groups, a quarter of 0.2 within
    assert between == pytest.approx(0.7**2 * (0.8 + 0.2 / 4), rel=0.04)
    assert LogNormal(700, 0.7, 900).draw(100, 4, rng).max() == 900
    seen = Measured(np.array([[1, 2], [30, 40]])).draw(200, 3, rng)
    assert set(np.unique(seen)) == {1, 2, 30, 40}
    assert all(set(group) <= {1, 2} or set(group) <= {30, 40} for group in seen.tolist())


def test_the_same_question_has_the_same_answer() -> None:
    first = predict(SEVEN_B, SEED_JOB, GUESSED, LENGTHS)
    assert predict(SEVEN_B, SEED_JOB, GUESSED, LENGTHS) == first
