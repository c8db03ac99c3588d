"""SAPO: a soft gate in place of a clip, which lets a token's gradient decay instead of cutting it.

Source: Soft Adaptive Policy Optimization, arXiv:2511.20347, section 3.

loss = -A 4 / tau sigmoid(tau (r - 1)),   r = p / p_old, tau = tau_positive if A > 0 else tau_negative
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1zero.algo.losses import policy_loss
from r1zero.algo.stats import Stat
from r1zero.types import Reduce

if TYPE_CHECKING:
    from r1zero.algo.loss_batch import LossBatch
    from r1zero.algo.losses import TokenLoss

GATE = Stat(
    key="gate/mean",
    reduce=Reduce.TOKEN_MEAN,
    title="Gate of the gradient",
    label="mean",
    unit="share",
    note="What the gate leaves of a token's gradient: all at ratio 1, less the farther from it.",
)


@policy_loss(stats=(GATE,), limits={"tau_positive": (0.01, 100), "tau_negative": (0.01, 100)})
def sapo(batch: LossBatch, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> TokenLoss:
    """Nothing is cut: the gradient is -A r times the gate 4 sigmoid (1 - sigmoid), 1 at ratio 1.

    A larger tau narrows the gate. Bad tokens have the larger one, since pushing a token down raises
    all others of the vocabulary, most of which nobody asked for.
    """
    ratio = batch.ratio()
    is_good = batch.advantages > 0
    tau = is_good.to(ratio.dtype) * (tau_positive - tau_negative) + tau_negative
    opened = (tau * (ratio - 1)).sigmoid()
    return -batch.advantages * 4 / tau * opened, {GATE.key: 4 * opened * (1 - opened)}
