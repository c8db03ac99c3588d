"""What a reward function sees. A custom one needs nothing else of this package:

    from collections.abc import Sequence
    from r1zero.reward.types import RewardInput

    def score(cases: Sequence[RewardInput]) -> Sequence[float]:
        return [float(case.response.endswith(case.gold)) for case in cases]

A batch holds all responses to one prompt. The values may have any
scale; `verifier_weight` brings them in line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RewardInput:
    r"""One response to a problem.

    RewardInput("What is 1 + 1?", r"It is \boxed{2}.", "2", tokens=9, limit=512, truncated=False,
    right=True)
    """

    prompt: str  # as the model got it, with its template
    response: str  # without special tokens
    gold: str  # the right answer: 72 where the data has "#### 72"
    tokens: int  # of the response, its end-of-text token included
    limit: int  # most tokens that a response may have
    truncated: bool  # ended by the limit, not by the model
    # verdict of acc or base_acc; None before it, or when neither is listed
    right: bool | None = None


CustomReward = Callable[[Sequence[RewardInput]], Sequence[float]]
