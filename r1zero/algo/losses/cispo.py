"""CISPO: REINFORCE with capped importance weights, which keep every token's gradient.

Source: arXiv:2506.13585, eq. 4 and 5.

loss = -stop(min(r, ratio_cap)) A log p,   r = p / p_old
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1zero.algo.losses import policy_loss
from r1zero.algo.stats import Stat
from r1zero.types import Reduce

if TYPE_CHECKING:
    from r1zero.algo.loss_batch import LossBatch
    from r1zero.algo.losses import TokenLoss

CAPPED = Stat(
    key="clip_fraction",
    reduce=Reduce.TOKEN_MEAN,
    title="Capped tokens",
    label="capped",
    unit="share",
    note="Tokens whose ratio to the old policy was above the cap; they keep a gradient.",
)


@policy_loss(stats=(CAPPED,), limits={"ratio_cap": (1, 1000)})
def cispo(batch: LossBatch, *, ratio_cap: float = 5.0) -> TokenLoss:
    """`ratio_cap` bounds the ratio itself: the paper's 1 + epsilon. It has no lower bound."""
    ratio = batch.ratio().detach()
    weight = ratio.clamp(max=ratio_cap)
    is_capped = (ratio > ratio_cap).float()
    return -weight * batch.advantages * batch.logprobs, {CAPPED.key: is_capped}
