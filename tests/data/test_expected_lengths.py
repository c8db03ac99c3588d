"""Expected lengths: hand-worked orders and bands, and going on from a checkpoint."""

from __future__ import annotations

import numpy as np

from r1zero.checkpoint import lengths
from r1zero.data.expected_lengths import ExpectedLengths
from r1zero.types import Prompt


def prompt(index: int, tokens: int) -> Prompt:
    return Prompt(index, "", np.zeros(tokens, np.int32), "")


def indices(prompts: list[Prompt]) -> list[int]:
    return [found.index for found in prompts]


def test_at_first_the_length_of_the_prompt_counts_and_equals_keep_their_order():
    drawn = [prompt(7, 30), prompt(3, 10), prompt(9, 30), prompt(1, 20), prompt(2, 10)]
    assert indices(ExpectedLengths().order(drawn)) == [3, 2, 1, 7, 9]


def test_what_was_seen_counts_and_scales_what_was_not():
    """10 and 30 prompt tokens with answers of 100 and 140: 6 tokens of answer for each of the
    prompt."""
    known = ExpectedLengths()
    known.record([prompt(0, 10), prompt(1, 30)], [[90, 110], [0, 280]])
    new = [prompt(5, 24), prompt(6, 20), prompt(7, 16)]  # 144, 120 and 96
    drawn = [prompt(1, 30), *new, prompt(0, 10)]
    assert indices(known.order(drawn)) == [7, 0, 6, 1, 5]
    known.record([prompt(1, 30)], [[20, 40]])  # 3.25 tokens each: 78, 65 and 52
    assert indices(known.order(drawn)) == [1, 7, 6, 5, 0]


def test_of_a_prompt_that_was_drawn_twice_the_later_one_counts():
    known = ExpectedLengths()
    known.record([prompt(0, 10), prompt(1, 10), prompt(0, 10)], [[900, 900], [50, 50], [40, 40]])
    assert indices(known.order([prompt(1, 10), prompt(0, 10)])) == [0, 1]


def test_the_longest_responses_are_those_of_the_last_step():
    known = ExpectedLengths()
    assert (known.longest(100), known.typical(50)) == (100, 50), "before the first"
    known.record([prompt(0, 1)], [[3, 400]])  # a step that is over
    groups = [[90, 1], [7, 7], [2, 20], [8, 0], [5, 3]]
    known.record([prompt(number, 10) for number in range(5)], groups)
    assert (known.longest(100), known.typical(50)) == (90, 26)


def test_another_process_goes_on_where_a_checkpoint_was(tmp_path):
    known = ExpectedLengths()
    random = np.random.default_rng(3)
    seen = [prompt(index, int(random.integers(1, 99))) for index in range(40)]
    known.record(seen, random.integers(0, 300, (40, 3)).tolist())
    known.record(seen[5:9], random.integers(0, 300, (4, 7)).tolist())
    lengths.write(tmp_path, known.state())
    resumed = ExpectedLengths()
    resumed.restore(lengths.read(tmp_path))
    drawn = [prompt(int(index), int(index)) for index in random.permutation(range(20, 80))]
    assert indices(resumed.order(drawn)) == indices(known.order(drawn))
    assert resumed.longest(0) == known.longest(0) > 0
    assert resumed.typical(0) == known.typical(0)
    for state in (known.state(), resumed.state()):
        assert list(state["index"]) == list(range(40))


def test_a_checkpoint_without_lengths_begins_with_none(tmp_path):
    assert lengths.read(tmp_path) is None
    empty = ExpectedLengths()
    lengths.write(tmp_path, empty.state())
    empty.restore(lengths.read(tmp_path))
    assert empty.longest(10) == 10
