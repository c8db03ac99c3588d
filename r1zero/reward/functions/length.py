"""Length penalty (Kimi k1.5, arXiv:2501.12599, section 2.3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from r1zero.reward.functions import reward_function
from r1zero.reward.types import RewardInput


@reward_function(scope="group", needs_verdict=True, needs_tokens=True)
def length(cases: Sequence[RewardInput]) -> list[float]:
    """Prefer the shorter answers of a group.

    lambda = 1/2 - (len - min len) / (max len - min len); worth lambda if right, min(0, lambda) if
    not, 0 for all when they are equally long. From 1/2 to -1/2. Lengths are in tokens.
    """
    shortest = min(case.tokens for case in cases)
    longest = max(case.tokens for case in cases)
    if shortest == longest:
        return [0.0] * len(cases)
    grades = [0.5 - (case.tokens - shortest) / (longest - shortest) for case in cases]
    return [
        grade if case.right else min(0.0, grade) for case, grade in zip(cases, grades, strict=True)
    ]
