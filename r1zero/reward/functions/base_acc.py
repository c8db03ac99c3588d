"""Accuracy that is worth 1 or 0, whatever the settings of acc say about its values."""

from __future__ import annotations

from typing import Literal

from r1zero.config.keys import OneOf
from r1zero.reward.functions import reward_function
from r1zero.reward.types import RewardInput
from r1zero.reward.verdict import verdict
from r1zero.scores import Outcome, Score


@reward_function(scope="sample", gives_verdict=True, shares="acc")
def base_acc(
    case: RewardInput, *, copied_span: OneOf[Literal["wrong", "right"]] = "wrong"
) -> Score:
    """Compare the boxed answer with the right one."""
    outcome = verdict(case, copies_are_right=copied_span == "right")
    return Score(float(outcome is Outcome.RIGHT), outcome)
