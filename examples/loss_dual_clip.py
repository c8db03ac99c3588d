"""An own policy loss: dual-clip PPO, which also bounds how much a bad token may cost.

Source: arXiv:1912.09729, eq. 5.

algorithm:
  loss: examples/loss_dual_clip.py:dual_clip
  loss_settings: {most_cost: 3.0}
"""

from __future__ import annotations

import torch

from r1zero.algo.loss_batch import LossBatch
from r1zero.algo.losses import TokenLoss, policy_loss
from r1zero.algo.stats import Stat
from r1zero.types import Reduce

BOUNDED = Stat(
    key="dual_clip_fraction",
    reduce=Reduce.TOKEN_MEAN,
    title="Tokens bounded by the second clip",
    label="bounded",
    unit="share",
)


@policy_loss(stats=(BOUNDED,), limits={"most_cost": (1, 100)})
def dual_clip(
    batch: LossBatch, *, clip_low: float, clip_high: float, most_cost: float = 3.0
) -> TokenLoss:
    """`most_cost` is c of the paper: a token with A < 0 costs at most -A c, whatever its ratio."""
    ratio = batch.ratio()
    plain = -batch.advantages * ratio
    clipped = -batch.advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    cost = torch.maximum(plain, clipped)
    limit = -batch.advantages * most_cost
    is_bounded = (batch.advantages < 0) & (cost > limit)
    return torch.where(is_bounded, limit, cost), {BOUNDED.key: is_bounded.float()}
