"""Soft overlong punishment (DAPO, arXiv:2503.14476, equation 13)."""

from __future__ import annotations

from r1zero.config.keys import Count, OrNull
from r1zero.reward.functions import reward_function
from r1zero.reward.types import RewardInput

CACHE_SHARE = 0.2  # of the limit: 4096 of 20480 in the paper


@reward_function(scope="sample", needs_tokens=True, failed=-1.0)
def overlong(
    case: RewardInput,
    *,
    cache_tokens: OrNull[Count] = None,  # before the limit; default a fifth of it
) -> float:
    """Punish the last `cache_tokens` before the limit.

    0 up to limit - cache, from there linearly down to -1 at the limit.
    """
    cache = cache_tokens or max(1.0, CACHE_SHARE * case.limit)
    return -min(1.0, max(0.0, (case.tokens - (case.limit - cache)) / cache))
