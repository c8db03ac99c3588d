"""OPO: less the mean of the group's rewards weighted by length.

Source: arXiv:2505.23585. The baseline of least variance, if the gradients of tokens are alike.

A = R - sum(n R) / sum(n),   n: tokens of a response
"""

from __future__ import annotations

import numpy as np

from r1zero.algo.advantages import advantage
from r1zero.algo.group_table import GroupTable, less


@advantage(equal_groups_are_zero=True)
def opo(table: GroupTable) -> np.ndarray:
    """A long response moves the baseline more."""
    tokens = table.counted.sum(axis=1, keepdims=True)
    weighted = (table.counted * table.rewards).sum(axis=1, keepdims=True)
    return less(table.rewards, weighted / np.maximum(tokens, 1))
