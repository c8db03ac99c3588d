"""Cosine reward (Yeo et al., arXiv:2502.03373, section 4.2, equation 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from r1zero.reward.functions import Worth, reward_function
from r1zero.reward.types import RewardInput


# The values are the paper's (appendix E.5). Short is length 0, long just below the limit.
@reward_function(scope="group", needs_verdict=True, needs_tokens=True)
def cosine(
    cases: Sequence[RewardInput],
    *,
    right_short: Worth = 2.0,
    right_long: Worth = 1.0,
    wrong_short: Worth = -10.0,
    wrong_long: Worth = 0.0,
    exceeded: Worth = -10.0,  # at the limit
) -> list[float]:
    """Prefer short right answers and long wrong ones.

    long + (short - long) / 2 * (1 + cos(pi * len / limit)), with (short, long) by verdict; at the
    limit, `exceeded` whatever the verdict. Lengths are in tokens.
    """

    def value(case: RewardInput) -> float:
        if case.tokens >= case.limit:
            return exceeded
        right = (right_short, right_long)
        wrong = (wrong_short, wrong_long)
        short, long = right if case.right else wrong
        return long + (short - long) / 2 * (1 + math.cos(math.pi * case.tokens / case.limit))

    return [value(case) for case in cases]
