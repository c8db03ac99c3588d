"""REINFORCE++: no baseline but that of the update, by whitening over its tokens.

Source: arXiv:2501.03262. Equal rewards of a group have an advantage, too.

A = (R - mean) / std, both over the tokens of the update
"""

from __future__ import annotations

import numpy as np

from r1zero.algo.advantages import advantage
from r1zero.algo.group_table import GroupTable


@advantage(whitens="tokens")
def reinforce_pp(table: GroupTable) -> np.ndarray:
    """The rewards as they are; a group is nothing to it."""
    return table.rewards
