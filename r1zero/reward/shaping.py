"""Reward shaping: length penalties and repetition penalties, formulas as published.

Lengths are in tokens. `docs/rewards.md` says what each term is for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from r1zero.config.schema import Cosine
from r1zero.reward.types import RewardInput

# A word, a CJK character, or a mark: texts without spaces have n-grams, too.
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")
OVERLONG_CACHE_SHARE = 0.2  # of the limit: 4096 of 20480 in the paper


def length(cases: Sequence[RewardInput]) -> list[float]:
    """Prefer the shorter answers of a group (Kimi k1.5, arXiv:2501.12599, section 2.3.3).

    lambda = 1/2 - (len - min len) / (max len - min len); worth lambda if right, min(0, lambda) if
    not, 0 for all when they are equally long. From 1/2 to -1/2.
    """
    shortest = min(case.tokens for case in cases)
    longest = max(case.tokens for case in cases)
    if shortest == longest:
        return [0.0] * len(cases)
    grades = [0.5 - (case.tokens - shortest) / (longest - shortest) for case in cases]
    return [
        grade if case.right else min(0.0, grade) for case, grade in zip(cases, grades, strict=True)
    ]


def cosine(cases: Sequence[RewardInput], values: Cosine) -> list[float]:
    """Prefer short right answers and long wrong ones (Yeo et al., arXiv:2502.03373, section 4.2,
    equation 1).

    long + (short - long) / 2 * (1 + cos(pi * len / limit)), with (short, long) by verdict; at the
    limit, `exceeded` whatever the verdict.
    """

    def value(case: RewardInput) -> float:
        if case.tokens >= case.limit:
            return values.exceeded
        right = (values.right_short, values.right_long)
        wrong = (values.wrong_short, values.wrong_long)
        short, long = right if case.right else wrong
        return long + (short - long) / 2 * (1 + math.cos(math.pi * case.tokens / case.limit))

    return [value(case) for case in cases]


def overlong(case: RewardInput, cache_tokens: int | None) -> float:
    """Punish the last `cache_tokens` before the limit (DAPO, arXiv:2503.14476, equation 13).

    0 up to limit - cache, from there linearly down to -1 at the limit.
    """
    cache = cache_tokens or max(1.0, OVERLONG_CACHE_SHARE * case.limit)
    return -min(1.0, max(0.0, (case.tokens - (case.limit - cache)) / cache))


def repetition(case: RewardInput, ngram: int) -> float:
    """Punish n-grams of words that stood before (after arXiv:2502.03373, appendix C.2, algorithm
    1).

    -(1 - distinct n-grams / all n-grams), from 0 to -1. The paper punishes each repeated token; one
    value per response needs their share.
    """
    words = _WORD.findall(case.response)
    if len(words) < ngram:
        return 0.0
    seen: dict[str, int] = {}
    # of the n-gram that begins here
    ids = np.array([seen.setdefault(word, len(seen)) for word in words])
    size = 1
    while size < ngram:  # two n-grams that overlap or touch make a longer one
        step = min(size, ngram - size)
        _, ids = np.unique(ids[:-step] * len(words) + ids[step:], return_inverse=True)
        size += step
    return len(np.unique(ids)) / len(ids) - 1.0
