"""An own advantage: RLOO, the reward less the mean of the other responses.

Source: arXiv:2402.14740, section 2.3.

algorithm:
  advantage: examples/advantage_leave_one_out.py:leave_one_out
"""

from __future__ import annotations

import numpy as np


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """From the rewards of a minibatch's groups, float64 [groups, G], to advantages [groups, G]."""
    size = rewards.shape[1]
    others = (rewards.sum(axis=1, keepdims=True) - rewards) / (size - 1)
    return rewards - others
