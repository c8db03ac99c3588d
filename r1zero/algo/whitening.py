"""Whitening: advantages shifted and scaled to mean 0 and variance 1 over an update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

# Over all counted tokens, where a long response weighs more, since each of its tokens has its
# advantage; or over samples, which all weigh the same.
Whitening = Literal["tokens", "samples"]
TINY = 1e-8


def whiten(
    advantages: Sequence[float] | np.ndarray,
    counted: Sequence[int] | np.ndarray,
    over: Whitening = "tokens",
) -> np.ndarray:
    """(a - mean) / sqrt(variance + 1e-8), variance with n - 1; one value a sample, float64 [S]."""
    values = np.asarray(advantages, np.float64)
    weights = np.ones(len(values))
    if over == "tokens":
        weights = np.asarray(counted, np.float64)
    total = weights.sum()
    mean = (values * weights).sum() / max(total, 1)
    variance = (weights * (values - mean) ** 2).sum() / max(total - 1, 1)
    return (values - mean) / np.sqrt(variance + TINY)
