"""Dual clip: PPO's clipped surrogate that also bounds what a bad token may cost.

Source: arXiv:1912.09729, eq. 5.

loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), at most -A clip_dual where A < 0
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1zero.algo.clipping import CLIPPED_TOKENS, clip_values, clipped
from r1zero.algo.losses import policy_loss

if TYPE_CHECKING:
    from r1zero.algo.loss_batch import LossBatch
    from r1zero.algo.losses import TokenLoss


@policy_loss(
    stats=CLIPPED_TOKENS,
    limits={"clip_low": (0, 1), "clip_high": (0, 100), "clip_dual": (1.01, 1000)},
)
def dual_clip(
    batch: LossBatch, *, clip_low: float, clip_high: float, clip_dual: float = 3.0
) -> TokenLoss:
    """`clip_dual` is c of the paper: the largest ratio at which a token with A < 0 has a gradient.

    Without it one such token, whose ratio has no upper bound, can rule the gradient of a minibatch.
    """
    ratio = batch.ratio()
    losses, low, high = clipped(ratio, batch.advantages, clip_low, clip_high)
    is_bad = batch.advantages < 0
    bounded = losses.minimum(-batch.advantages * clip_dual)
    too_high = is_bad & (ratio > clip_dual)
    return bounded.where(is_bad, losses), clip_values(low, high | too_high)
