"""The cuts of a batch: each group is in one part, and parts are cut where a wait would be longest."""

from __future__ import annotations

from itertools import product

import pytest

from r1zero.algo.parts import band_edges, cut_parts, plan_parts, shifted
from r1zero.types import ANY_LENGTH, Part

LONGER = range(11, ANY_LENGTH)


def test_blocks_are_cut_into_bands_and_what_is_longest_into_pieces():
    assert cut_parts(5, blocks=2, edges=[10], pieces=2) == (
        Part(range(2), range(11)),
        Part(range(1), LONGER),
        Part(range(1, 2), LONGER),
        Part(range(2, 5), range(11)),
        Part(range(2, 3), LONGER),
        Part(range(3, 5), LONGER),
    )


@pytest.mark.parametrize(
    ("count", "longest", "edges"),
    [
        (1, 90, []),
        (2, 90, [45]),
        (4, 90, [22, 45, 67]),
        (9, 4, [1, 2, 3]),  # no more bands than there are lengths
        (3, 0, []),
    ],
)
def test_bands_end_at_equal_steps(count, longest, edges):
    assert band_edges(count, longest) == edges


def test_one_minibatch_is_cut_after_the_other_where_each_has_an_update():
    parts = plan_parts(12, most=6, rounds=1, minibatches=3, longest=20)
    assert [part.positions for part in parts] == [
        *[range(4)] * 2,
        *[range(4, 8)] * 2,
        *[range(8, 12)] * 2,
    ]
    assert [part.lengths for part in parts] == [range(11), LONGER] * 3


def test_the_whole_batch_is_cut_by_length_where_parts_are_learnt_from():
    parts = plan_parts(12, most=8, rounds=1, minibatches=None, longest=70)
    assert [part.positions for part in parts] == [
        *[range(12)] * 6,
        range(6),
        range(6, 12),
    ]
    assert [part.lengths.start for part in parts] == [0, 11, 21, 31, 41, 51, 61, 61]


@pytest.mark.parametrize("minibatches", [None, 1, 3, 40])
@pytest.mark.parametrize(("rounds", "most"), [(1, 1), (1, 16), (3, 16), (50, 16), (2, 5)])
def test_each_group_is_in_one_part(rounds, most, minibatches):
    parts = plan_parts(7, most, rounds, minibatches, longest=30)
    assert len(parts) <= most
    for position, length in product(range(7), range(40)):
        held = [position in part.positions and length in part.lengths for part in parts]
        assert held.count(True) == 1


def test_the_parts_of_a_later_round_lie_behind_the_earlier_ones():
    parts = shifted(cut_parts(5, blocks=2, edges=[10]), 7)
    assert [part.positions for part in parts] == [*[range(7, 9)] * 2, *[range(9, 12)] * 2]
    assert [part.lengths for part in parts] == [range(11), LONGER] * 2
