"""An own advantage: only the best response of a group learns, from what it is better by.

Source: arXiv:2503.19595. The goal is that the best of G responses is good, not that all are.

algorithm:
  advantage: examples/advantage_best_only.py:best_only
"""

from __future__ import annotations

import numpy as np

from r1zero.algo.advantages import advantage
from r1zero.algo.group_table import EPSILON, GroupTable


@advantage(equal_groups_are_zero=True)
def best_only(table: GroupTable) -> np.ndarray:
    """(largest - second) / std for the largest reward of each group, 0 for the others: [n, G]."""
    ascending = np.sort(table.rewards, axis=1)
    gain = ascending[:, -1:] - ascending[:, -2:-1]
    is_best = table.rewards == ascending[:, -1:]
    spread = table.rewards.std(axis=1, ddof=1, keepdims=True)
    return is_best * gain / (spread + EPSILON)
