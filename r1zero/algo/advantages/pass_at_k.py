"""pass@k as the goal: the reward of k responses is that of the best, averaged over all choices of k.

Source: arXiv:2508.10751 (analytic form). With c right responses of G, and C for binomials:

    rho = 1 - C(G - c, k) / C(G, k)      the estimate of pass@k
    sigma = sqrt(rho (1 - rho))
    right:  A = (1 - rho) / sigma
    wrong:  A = (1 - rho - C(G - c - 1, k - 1) / C(G - 1, k - 1)) / sigma

It is 0 where sigma is: none right, or so many that every k of them hold one.
"""

from __future__ import annotations

from math import comb, sqrt
from typing import Annotated

import numpy as np

from r1zero.algo.advantages import advantage
from r1zero.algo.group_table import GroupTable
from r1zero.config.keys import Whole, between
from r1zero.errors import BadInput


@advantage(equal_groups_are_zero=True, needs=("verdict",))
def pass_at_k(table: GroupTable, *, k: Annotated[Whole, between(1, 1024, 4)]) -> np.ndarray:
    """By verdicts alone: no other reward function has a part. BadInput if k is above G."""
    size = table.right.shape[1]
    if k > size:
        raise BadInput(
            f"algorithm.advantage_settings.k: {k} must be at most "
            f"actor_rollout.n_samples_per_prompt: {size}"
        )
    found = np.zeros(table.right.shape)
    for row, right in enumerate(table.right):
        of_right, of_wrong = _advantages(int(right.sum()), size, k)
        found[row] = np.where(right, of_right, of_wrong)
    return found


def _advantages(right: int, size: int, k: int) -> tuple[float, float]:
    """The advantage of a right and of a wrong response in a group with so many right ones."""
    rho = 1 - comb(size - right, k) / comb(size, k)
    sigma = sqrt(rho * (1 - rho))
    if sigma == 0:
        return 0.0, 0.0
    none_of_others = comb(size - right - 1, k - 1) / comb(size - 1, k - 1)
    return (1 - rho) / sigma, (1 - rho - none_of_others) / sigma
