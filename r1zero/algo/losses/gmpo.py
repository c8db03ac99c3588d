"""GMPO: the geometric mean of a response's ratios, each clipped before it enters the mean.

Source: Geometric-Mean Policy Optimization, arXiv:2507.20673, section 3; the bound: section 4.

    x_t  = log(p / p_old), clipped where it gains: to at most clip_log if A > 0, to at least
           -clip_log if A < 0
    loss = -A exp(mean over the response of x_t)

in the form for tokens that gspo.py explains: equal in value, and each token has its own gradient, 0
where it was clipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1zero.algo.clipping import CLIPPED_TOKENS, clip_values
from r1zero.algo.losses import policy_loss

if TYPE_CHECKING:
    from r1zero.algo.loss_batch import LossBatch
    from r1zero.algo.losses import TokenLoss


@policy_loss(
    stats=CLIPPED_TOKENS,
    aggregations=("sequence_mean",),
    limits={"clip_log": (1e-6, 20)},
    ratio="sequence",
)
def gmpo(batch: LossBatch, *, clip_log: float = 0.4) -> TokenLoss:
    """`clip_log` bounds log-ratios: 0.4 lets a ratio gain up to e^0.4 = 1.49, or down to 0.67."""
    log_ratio = batch.log_ratio()
    low = (batch.advantages < 0) & (log_ratio < -clip_log)
    high = (batch.advantages > 0) & (log_ratio > clip_log)
    bounded = log_ratio.clamp(-clip_log, clip_log)
    ratio = batch.sequence_ratio(bounded.where(low | high, log_ratio))
    return -batch.advantages * ratio, clip_values(low, high)
