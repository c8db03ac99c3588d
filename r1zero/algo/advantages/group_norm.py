"""GRPO: less the group's mean, over its deviation.

Source: arXiv:2402.03300, section 4.1.2. The deviation is that with n - 1, plus 1e-6.

A = (R - mean) / std
"""

from __future__ import annotations

import numpy as np

from r1zero.algo.advantages import advantage
from r1zero.algo.group_table import GroupTable, normalised


@advantage(equal_groups_are_zero=True)
def group_norm(table: GroupTable) -> np.ndarray:
    """Groups that are nearly all right or all wrong weigh more: their deviation is small."""
    return normalised(table.rewards)
