"""Tail batching: hand-worked draws, limits and epochs."""

from __future__ import annotations

import numpy as np
import pytest

from r1zero.data.tail_batching import Draw, Late, TailBatching
from r1zero.types import Batch, Prompt

BUDGET = 1000


def play(tail: TailBatching, draw: Draw, indices, lengths, step: int = 1) -> list[int]:
    """One step whose groups of two have these longest lengths; returns those that were answered."""
    prompts = [Prompt(index, "", np.zeros(3, np.int32), "") for index in indices]
    batch = Batch(step, 0, prompts, 2, 2, response_limit=draw.limit, first_draws=draw.first_draws)
    limit = draw.limit or BUDGET
    drawn = np.array([[min(longest, limit), 1] for longest in lengths])
    late = np.array([draw.limit is not None and longest > limit for longest in lengths])
    tail.record(batch, drawn, late)
    return [index for index, is_late in zip(indices, late, strict=True) if not is_late]


def test_the_first_step_is_whole_and_tells_where_short_ones_stop():
    tail = TailBatching(0.75)
    first = tail.draw(4, BUDGET)
    assert first == Draw(4)
    play(tail, first, [0, 1, 2, 3], [10, 400, 20, 30])
    assert tail.draw(4, BUDGET) == Draw(6, limit=30), "three of four ended by 30; 4 / 0.75 = 6"


def test_what_has_not_ended_waits_and_has_a_step_of_its_own():
    tail = TailBatching(0.75)
    play(tail, tail.draw(4, BUDGET), [0, 1, 2, 3], [10, 400, 20, 30])
    short = tail.draw(4, BUDGET)
    assert play(tail, short, range(4, 10), [10, 500, 30, 31, 5, 8]) == [4, 6, 8, 9]
    assert tail.waiting == 2
    short = tail.draw(4, BUDGET)
    assert short == Draw(6, limit=38), "4 of 6 ended, 4.5 should have: a quarter longer"
    play(tail, short, range(10, 16), [900, 39, 38, 2, 1, 3], step=2)
    assert tail.waiting == 4
    long = tail.draw(4, BUDGET)
    assert long == Draw(0, put_off=(Late(5, 1, 1), Late(7, 1, 3), Late(10, 2, 0), Late(11, 2, 1)))
    assert long.first_draws == ((1, 1), (1, 3), (2, 0), (2, 1))
    assert tail.waiting == 0


def test_a_step_of_those_that_waited_does_not_move_the_limit():
    tail = TailBatching(0.5)
    play(tail, tail.draw(2, BUDGET), [0, 1], [10, 40])
    short = tail.draw(2, BUDGET)
    play(tail, short, [2, 3, 4, 5], [10, 90, 80, 7])
    long = tail.draw(2, BUDGET)
    assert [late.index for late in long.put_off] == [3, 4]
    assert play(tail, long, [3, 4], [90, 80]) == [3, 4]
    assert tail.draw(2, BUDGET) == short


def test_without_long_answers_every_step_is_whole():
    tail = TailBatching(0.75)
    play(tail, tail.draw(2, BUDGET), [0, 1], [BUDGET, BUDGET])
    assert tail.draw(2, BUDGET) == Draw(2)


@pytest.mark.parametrize("sigma", [0.8, 1.2])
def test_every_prompt_is_answered_once(sigma):
    """64 steps over prompts with log-normal lengths: each was answered, or waits."""
    random = np.random.default_rng(5)
    length = np.clip(np.exp(4 + sigma * random.normal(size=4000)), 1, BUDGET).astype(int)
    tail = TailBatching(0.8)
    cursor = 0
    answered = []
    shares = []
    for _ in range(64):
        draw = tail.draw(16, BUDGET)
        indices = [*(late.index for late in draw.put_off), *range(cursor, cursor + draw.fresh)]
        cursor += draw.fresh
        done = play(tail, draw, indices, length[indices])
        answered += done
        if draw.limit is not None:
            shares.append(len(done) / len(indices))
    assert len(set(answered)) == len(answered), "none twice"
    assert len(answered) + tail.waiting == cursor
    # 20 groups a step: the share of those that end has a standard deviation of 0.09 by chance, and
    # the limit follows the step before, 0.13 in all; 40 steps bring the mean to 0.02
    assert 0.72 < np.mean(shares) < 0.88


def test_another_process_goes_on_where_a_checkpoint_was():
    tail = TailBatching(0.75)
    play(tail, tail.draw(4, BUDGET), [0, 1, 2, 3], [10, 400, 20, 30])
    play(tail, tail.draw(4, BUDGET), range(4, 10), [10, 500, 30, 31, 5, 8])
    resumed = TailBatching(0.75)
    resumed.restore(tail.state(), range(100))
    assert resumed.waiting == tail.waiting == 2
    assert resumed.draw(4, BUDGET) == tail.draw(4, BUDGET)
    assert resumed.draw(2, BUDGET) == tail.draw(2, BUDGET)
    fresh = TailBatching(0.75)
    fresh.restore(TailBatching(0.75).state(), range(100))
    assert fresh.draw(4, BUDGET) == Draw(4)


def test_what_waits_and_is_no_longer_there_is_forgotten():
    tail = TailBatching(0.75)
    play(tail, Draw(2, limit=9), [20, 21], [90, 90])
    changed = TailBatching(0.75)
    changed.restore(tail.state(), {20, 5})
    assert changed.waiting == 1
