"""GDPO: the scores of each reward function normalised by themselves, then summed with their weights.

Source: arXiv:2601.05242. The sum is whitened over the samples of the update: over tokens, long
responses would count more. "Right, badly formed" and "wrong, well formed" stay apart, which a
normalised sum of the scores cannot do.

A = (B - mean) / std over the samples of the update,   B = sum over functions w (s - mean) / std
"""

from __future__ import annotations

import numpy as np

from r1zero.algo.advantages import advantage
from r1zero.algo.group_table import GroupTable, normalised
from r1zero.errors import BadInput


@advantage(whitens="samples", needs=("scores",))
def gdpo(table: GroupTable) -> np.ndarray:
    """The weights w are algorithm.verifier_weight. BadInput for a single reward function."""
    functions = len(table.score_weights)
    if functions < 2:
        raise BadInput(
            "algorithm.advantage: gdpo normalises reward functions one by one, and "
            "algorithm.verifier_function names only one; name a second one, or set advantage to "
            "group_norm"
        )
    total = np.zeros(table.rewards.shape)
    for number in range(functions):
        total += table.score_weights[number] * normalised(table.scores[:, :, number])
    return total
