"""How many prompts a round draws, by hand."""

from __future__ import annotations

import pytest

from r1zero.algo.rounds import round_size


@pytest.mark.parametrize(
    ("missing", "kept", "drawn", "expected"),
    [
        (4, 0, 0, 4),  # nothing is known yet
        (2, 2, 4, 4),
        (1, 2, 7, 4),  # 3.5
        (3, 8, 8, 3),
        (5, 1, 8, 40),  # an eighth, no less
        (5, 1, 9, 40),
        (5, 0, 100, 40),
        (10**6, 10**6 - 1, 10**6, 10**6 + 2),  # exact, where a quotient of floats need not be
    ],
)
def test_a_round_is_as_large_as_the_share_that_was_kept_makes_likely(
    missing, kept, drawn, expected
):
    assert round_size(missing, kept, drawn) == expected
