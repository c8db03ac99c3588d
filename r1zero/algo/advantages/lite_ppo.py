"""Lite PPO: less the group's mean, over the deviation of all rewards of the update.

Source: arXiv:2508.08221. The paper has one update a step; with several, the deviation is that of
each minibatch, which is all that is known when it is learnt from.

A = (R - mean of the group) / std of all rewards
"""

from __future__ import annotations

import numpy as np

from r1zero.algo.advantages import advantage
from r1zero.algo.group_table import EPSILON, GroupTable, group_mean, less


@advantage(equal_groups_are_zero=True, compares_groups=True)
def lite_ppo(table: GroupTable) -> np.ndarray:
    """All groups have one scale, so one with a small deviation does not weigh more."""
    spread = table.rewards.std(ddof=1)
    return less(table.rewards, group_mean(table.rewards)) / (spread + EPSILON)
