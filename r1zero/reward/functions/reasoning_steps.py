"""Reasoning steps: credit for marks of visible steps."""

from __future__ import annotations

import re

from r1zero.reward.functions import checked, reward_function
from r1zero.reward.types import RewardInput
from r1zero.scores import Score

_STEP = re.compile(
    r"Step \d+:"  # Step 3:
    r"|^[ \t]*\d+\.(?=\s)"  # 3. at the start of any line
    r"|\n-|\n\*"  # a bullet
    r"|\b(?:First|Second|Next|Finally),",
    re.MULTILINE,
)
STEPS_WANTED = 3


@reward_function(scope="sample")
def reasoning_steps(case: RewardInput) -> Score:
    """How many marks of a step there are, of three, at most 1. Takes time linear in the text."""
    return checked(min(1.0, len(_STEP.findall(case.response)) / STEPS_WANTED))
