"""GRPO: PPO's clipped surrogate with a bound for each side.

Source: arXiv:2402.03300, eq. 3, and for the two bounds arXiv:2503.14476, eq. 8.

loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),   r = p / p_old
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1zero.algo.clipping import CLIPPED_TOKENS, clip_values, clipped
from r1zero.algo.losses import policy_loss

if TYPE_CHECKING:
    from r1zero.algo.loss_batch import LossBatch
    from r1zero.algo.losses import TokenLoss


@policy_loss(stats=CLIPPED_TOKENS, limits={"clip_low": (0, 1), "clip_high": (0, 100)})
def grpo(batch: LossBatch, *, clip_low: float, clip_high: float) -> TokenLoss:
    """A clip only ever bounds a gain: a token that got worse than the bound keeps its gradient."""
    losses, low, high = clipped(batch.ratio(), batch.advantages, clip_low, clip_high)
    return losses, clip_values(low, high)
