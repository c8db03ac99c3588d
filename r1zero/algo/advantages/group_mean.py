"""Dr. GRPO: less the group's mean, not scaled.

Source: arXiv:2503.20783, section 3.2.

A = R - mean
"""

from __future__ import annotations

import numpy as np

from r1zero.algo.advantages import advantage
from r1zero.algo.group_table import GroupTable, less
from r1zero.algo.group_table import group_mean as mean_of_group


@advantage(equal_groups_are_zero=True)
def group_mean(table: GroupTable) -> np.ndarray:
    """An advantage is as large as the difference in reward."""
    return less(table.rewards, mean_of_group(table.rewards))
