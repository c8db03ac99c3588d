"""Advantages (baselines): from the rewards of groups to a number for each response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from r1zero.config.registry import Table
from r1zero.errors import BadInput

# From the rewards of a minibatch's groups, float64 [groups, G], to advantages of the same shape.
Advantage: TypeAlias = Callable[[np.ndarray], np.ndarray]

ADVANTAGES: Table[Advantage] = Table(
    "algorithm.advantage",
    refused={"gae": ": it needs the values of a critic, which GRPO does not have"},
)

# Keeps the quotient finite; far below the spread that any two different rewards have.
EPSILON = 1e-6


@ADVANTAGES.add
def group_norm(rewards: np.ndarray) -> np.ndarray:
    """Less the group's mean, over its deviation (GRPO, arXiv:2402.03300, section 4.1.2)."""
    return np.stack([group_advantages(group) for group in rewards])


def group_advantages(rewards: Sequence[float] | np.ndarray) -> np.ndarray:
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


def advantages_of(rewards: np.ndarray, advantage: Advantage) -> np.ndarray:
    """The advantage of every sample, float64 [groups, G], from the rewards of the same shape.

    Of all samples, also of those that are not learnt from: to leave one out changes no other's.
    BadInput when an own function does not return one finite number a sample.
    """
    values = np.asarray(advantage(rewards), dtype=np.float64)
    if values.shape != rewards.shape:
        raise BadInput(
            f"algorithm.advantage returned the shape {values.shape} for rewards of the shape "
            f"{rewards.shape}; return one number a sample"
        )
    if not np.isfinite(values).all():
        raise BadInput(
            f"algorithm.advantage returned {values.tolist()} for the rewards "
            f"{rewards.tolist()}; return finite numbers"
        )
    return values


def whiten(
    advantages: Sequence[float] | np.ndarray, lengths: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Shift and scale to mean 0 and variance 1 over all response tokens; one value a sample.

    Long responses weigh more, since each token carries its sample's advantage. float64 [S].
    """
    values = np.asarray(advantages, dtype=np.float64)
    weights = np.asarray(lengths, dtype=np.float64)
    total = weights.sum()
    mean = (values * weights).sum() / total
    variance = (weights * (values - mean) ** 2).sum() / max(total - 1, 1)
    return (values - mean) / np.sqrt(variance + 1e-8)
