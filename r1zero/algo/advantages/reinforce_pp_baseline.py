"""REINFORCE++ with a baseline: less the group's mean, then whitened over the tokens of the update.

Source: arXiv:2501.03262. Equal rewards of a group have an advantage after whitening, if a small one.

A = (B - mean) / std over the tokens of the update,   B = R - mean of the group
"""

from __future__ import annotations

import numpy as np

from r1zero.algo.advantages import advantage
from r1zero.algo.group_table import GroupTable, group_mean, less


@advantage(whitens="tokens")
def reinforce_pp_baseline(table: GroupTable) -> np.ndarray:
    """All groups have one scale."""
    return less(table.rewards, group_mean(table.rewards))
