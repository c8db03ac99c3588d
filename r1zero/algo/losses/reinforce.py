"""REINFORCE: the log-prob weighted by the advantage, without ratio or bound.

Source: Williams 1992 (REINFORCE); for language models RLOO, arXiv:2402.14740, section 2.

loss = -A log p
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1zero.algo.losses import policy_loss

if TYPE_CHECKING:
    from r1zero.algo.loss_batch import LossBatch
    from r1zero.algo.losses import TokenLoss


@policy_loss(ratio="none")
def reinforce(batch: LossBatch) -> TokenLoss:
    """Nothing corrects for the weights that drew the tokens: meant for one update a step."""
    return -batch.advantages * batch.logprobs, {}
