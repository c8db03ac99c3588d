"""Accuracy: whether the boxed answer is the right one."""

from __future__ import annotations

from typing import Literal

from r1zero.config.keys import OneOf
from r1zero.reward.functions import Worth, reward_function
from r1zero.reward.types import RewardInput
from r1zero.reward.verdict import verdict
from r1zero.scores import Outcome, Score


# MindSpeed-LLM's three levels are right 1, wrong -0.5, missing -1.
@reward_function(scope="sample", gives_verdict=True, failed="wrong")
def acc(
    case: RewardInput,
    *,
    right: Worth = 1.0,
    wrong: Worth = -1.0,
    missing: Worth = -1.0,  # a response without an answer
    # What an answer is that is but a piece of the question.
    copied_span: OneOf[Literal["wrong", "right"]] = "wrong",
) -> Score:
    """Compare the boxed answer with the right one."""
    outcome = verdict(case, copies_are_right=copied_span == "right")
    if outcome is Outcome.RIGHT:
        return Score(right, outcome)
    if outcome is Outcome.NO_ANSWER:
        return Score(missing, outcome)
    return Score(wrong, outcome)
