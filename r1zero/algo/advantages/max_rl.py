"""MaxRL: less the group's mean, over that mean; 0 where the mean is not above 0.

Source: arXiv:2602.02710. For rewards of 0 and 1 it is the gradient of the log-likelihood of a right
answer, to an order that grows with G: hard prompts weigh more.

A = (R - mean) / mean
"""

from __future__ import annotations

import numpy as np

from r1zero.algo.advantages import advantage
from r1zero.algo.group_table import GroupTable, group_mean, less


@advantage(equal_groups_are_zero=True)
def max_rl(table: GroupTable) -> np.ndarray:
    """Meant for rewards that are not negative: a mean near 0 of mixed signs explodes."""
    mean = group_mean(table.rewards)
    positive = mean > 0
    scale = np.where(positive, mean, 1.0)
    return np.where(positive, less(table.rewards, mean) / scale, 0.0)
