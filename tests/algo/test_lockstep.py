"""Replicas run as many microbatches as the one with the most."""

from __future__ import annotations

import pytest
from support.items import random_items

from r1zero.algo.lockstep import fill_up, most_microbatches


@pytest.mark.parametrize(("max_samples", "max_tokens", "most"), [(2, None, 3), (9, None, 1)])
def test_shares_are_filled_up_to_the_longest(max_samples, max_tokens, most):
    items = random_items()
    shares = [items[:3], items[3:], []]
    assert most_microbatches(shares, max_samples, max_tokens) == most
    cut = [items[:2], items[2:3]]
    assert fill_up(cut, 3) == [items[:2], items[2:3], []]
    assert fill_up([], 0) == []
