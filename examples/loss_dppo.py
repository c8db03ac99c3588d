"""An own policy loss: DPPO, which bounds how far a probability moves, not its ratio.

Source: arXiv:2602.04879, the variant by total variation.

    loss = -stop(min(r, ratio_cap)) A log p,   r = p / p_old

without a gradient where a token with A > 0 has gained more than `most_gain` of probability, or one
with A < 0 has lost more than `most_loss`. So a rare token may become many times as likely before it
is held, and a common one is held sooner than by a ratio.

algorithm:
  loss: examples/loss_dppo.py:dppo
  loss_settings: {most_gain: 0.2, most_loss: 0.2}
"""

from __future__ import annotations

from r1zero.algo.loss_batch import LossBatch
from r1zero.algo.losses import TokenLoss, policy_loss
from r1zero.algo.stats import Stat
from r1zero.types import Reduce

HELD = Stat(
    key="held_fraction",
    reduce=Reduce.TOKEN_MEAN,
    title="Tokens held by their probability",
    label="held",
    unit="share",
)


@policy_loss(
    stats=(HELD,), limits={"most_gain": (0, 1), "most_loss": (0, 1), "ratio_cap": (1, 1000)}
)
def dppo(
    batch: LossBatch, *, most_gain: float = 0.2, most_loss: float = 0.2, ratio_cap: float = 20.0
) -> TokenLoss:
    """Bounds are of probabilities, from 0 to 1."""
    moved = (batch.logprobs.exp() - batch.old_logprobs.exp()).detach()
    gained = (batch.advantages > 0) & (moved > most_gain)
    lost = (batch.advantages < 0) & (moved < -most_loss)
    held = gained | lost
    weight = batch.ratio().detach().clamp(max=ratio_cap).masked_fill(held, 0.0)
    return -weight * batch.advantages * batch.logprobs, {HELD.key: held.float()}
