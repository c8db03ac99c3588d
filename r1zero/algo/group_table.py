"""GroupTable: what an advantage estimator sees of groups, and the arithmetic that estimators share.

n groups of G responses. All of it is float64: a difference of equal rewards must be 0, and the
deviation of rewards that differ must not drown in rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Keeps quotients finite; far below the spread that any two different rewards have.
EPSILON = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTable:
    """The responses to n prompts, G to each. All groups are of one update."""

    rewards: np.ndarray  # float64 [n, G], weighted sums of the scores
    counted: np.ndarray  # int64 [n, G], response tokens that the loss mask leaves
    # bool [n, G], what the first reward function says that gives a verdict; False without one
    right: np.ndarray
    # float64 [n, G, K], values of the K reward functions; K is 0 if the estimator needs none
    scores: np.ndarray
    score_weights: np.ndarray  # float64 [K], algorithm.verifier_weight


def group_mean(values: np.ndarray) -> np.ndarray:
    """The mean of each group: [n, G] -> [n, 1]."""
    return values.mean(axis=1, keepdims=True)


def less(values: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Values [n, G] less a baseline [n, 1], exactly 0 in groups whose values are all equal:
    rounding must not invent a preference."""
    differ = values.min(axis=1, keepdims=True) < values.max(axis=1, keepdims=True)
    return np.where(differ, values - baseline, 0.0)


def normalised(values: np.ndarray) -> np.ndarray:
    """(value - mean) / (std + 1e-6) within each group, std with n - 1: [n, G] -> [n, G]."""
    spread = values.std(axis=1, ddof=1, keepdims=True)
    return less(values, group_mean(values)) / (spread + EPSILON)
