"""Strict format: nothing behind the answer, and no box in the thought."""

from __future__ import annotations

from r1zero.reward.boxes import last_box
from r1zero.reward.functions import checked, reward_function
from r1zero.reward.functions.format import full_format
from r1zero.reward.types import RewardInput
from r1zero.scores import Score


@reward_function(scope="sample", failed=-1.0)
def strict_format(case: RewardInput) -> Score:
    """1 for the full format that ends with `</answer>` and has no box in its thought, else -1."""
    response = case.response
    thought = response.partition("</think>")[0]
    strict = response.endswith("</answer>") and full_format(response) and last_box(thought) is None
    return checked(float(strict), wrong=-1.0)
