"""Repetition penalty (after arXiv:2502.03373, appendix C.2, algorithm 1)."""

from __future__ import annotations

import re

import numpy as np

from r1zero.config.keys import Count
from r1zero.reward.functions import reward_function
from r1zero.reward.types import RewardInput

# A word, a CJK character, or a mark: texts without spaces have n-grams, too.
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")


@reward_function(scope="sample", failed=-1.0)
def repetition(
    case: RewardInput,
    *,
    ngram: Count = 40,  # words that must repeat to count
) -> float:
    """Punish n-grams of words that stood before.

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
