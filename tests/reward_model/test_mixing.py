"""From the values of a reward model to rewards, worked by hand."""

from __future__ import annotations

import math

import pytest

from r1zero.reward_model.mixing import EPSILON, Mixing

PLAIN = dict(normalize="none", mean=0.0, std=1.0, clip=None, weight=1.0, with_rules=True)


def mixing(**keys) -> Mixing:
    return Mixing(**PLAIN | keys)


def test_of_a_group_less_its_mean_by_its_deviation() -> None:
    # 1, 3, 8: mean 4, squares 9 + 1 + 16 = 26, by n - 1 13
    deviation = math.sqrt(13) + EPSILON
    expected = [-3 / deviation, -1 / deviation, 4 / deviation]
    assert mixing(normalize="group").scaled([1.0, 3.0, 8.0]) == pytest.approx(expected, rel=1e-12)


def test_values_that_are_equal_but_for_rounding_add_nothing() -> None:
    group = mixing(normalize="group")
    assert group.parts([2.5, 2.5, 2.5]) == [0.0, 0.0, 0.0]
    assert group.parts([100.0, 100.0005]) == [0.0, 0.0]
    assert group.parts([0.0, 0.001])[0] < -0.7
    assert group.parts([5.0]) == [0.0]


def test_fixed_and_none() -> None:
    assert mixing(normalize="fixed", mean=2.0, std=4.0).scaled([0.0, 6.0]) == [-0.5, 1.0]
    assert mixing().scaled([0.25, 0.75]) == [0.25, 0.75]


def test_clip_bounds_what_is_scaled_and_the_weight_comes_last() -> None:
    bounded = mixing(normalize="fixed", mean=0.0, std=0.5, clip=3.0, weight=0.5)
    assert bounded.scaled([-9.0, 1.0, 9.0]) == [-3.0, 2.0, 3.0]
    assert bounded.parts([-9.0, 1.0, 9.0]) == [-1.5, 1.0, 1.5]


def test_what_has_no_value_gets_what_the_worst_of_its_group_gets() -> None:
    assert mixing().parts([None, 2.0, 1.0]) == [1.0, 2.0, 1.0]
    assert mixing().parts([None, None]) == [0.0, 0.0]
    by_group = mixing(normalize="group").scaled([1.0, None, 4.0])  # the example of the module
    assert by_group == pytest.approx([-0.577, -0.577, 1.155], abs=1e-3)
