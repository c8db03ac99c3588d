"""RLOO: less the mean of the other responses of the group.

Source: arXiv:2402.14740, section 2.3.

A = R - (sum - R) / (G - 1) = (R - mean) G / (G - 1)
"""

from __future__ import annotations

from typing import Annotated

import numpy as np

from r1zero.algo.advantages import advantage
from r1zero.algo.group_table import GroupTable, group_mean, less
from r1zero.config.keys import Text, always

# The deviation of the others may be 0 while the reward itself differs: of 1 0 0 0 the first would
# have an advantage of a million.
Unscaled = Annotated[
    Text, always("none", "the others of a group may all be equal, and their deviation 0")
]


@advantage(equal_groups_are_zero=True)
def leave_one_out(table: GroupTable, *, scale: Unscaled = "none") -> np.ndarray:
    """The baseline does not depend on the response itself, so the gradient has no bias."""
    size = table.rewards.shape[1]
    return less(table.rewards, group_mean(table.rewards)) * size / (size - 1)
