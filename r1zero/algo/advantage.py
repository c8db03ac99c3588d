"""Group-relative advantages (DeepSeekMath, arXiv:2402.03300, section 4.1.2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from r1zero.errors import BadInput

# Keeps the quotient finite; far below the spread that any two different rewards have.
EPSILON = 1e-6


def group_advantages(rewards: Sequence[float]) -> np.ndarray:
    """(r - mean) / (std + 1e-6) within one group, std with n - 1. float64 [G].

    Exactly zero where all rewards are equal: rounding must not invent a preference.
    BadInput for a group of one, whose deviation is undefined.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if len(values) < 2:
        raise BadInput(
            f"a group needs at least 2 samples to be normalised, found {len(values)}; "
            "raise n_samples_per_prompt"
        )
    if values.min() == values.max():
        return np.zeros_like(values)
    return (values - values.mean()) / (values.std(ddof=1) + EPSILON)


def whiten(advantages: Sequence[float], lengths: Sequence[int]) -> np.ndarray:
    """Shift and scale to mean 0 and variance 1 over all response tokens; one value a sample in and
    out.

    Long responses weigh more, since each token carries its sample's advantage. float64 [S].
    """
    values = np.asarray(advantages, dtype=np.float64)
    weights = np.asarray(lengths, dtype=np.float64)
    total = weights.sum()
    mean = (values * weights).sum() / total
    variance = (weights * (values - mean) ** 2).sum() / max(total - 1, 1)
    return (values - mean) / np.sqrt(variance + 1e-8)
