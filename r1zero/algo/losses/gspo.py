"""GSPO: one ratio a sequence, clipped as a whole.

Source: arXiv:2507.18071, eq. 5 and 7, in the form for tokens of eq. 13 and 14.

    s = exp(mean over the response of log(p / p_old)),   s_t = stop(s) p / stop(p)
    loss = max(-A s_t, -A clip(s_t, 1 - clip_low, 1 + clip_high))

s_t equals s in value, and hands each token its own gradient. The mean over a sequence of the
gradients of its s_t is that of s: the token form serves, with a mean over tokens, then sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1zero.algo.clipping import CLIPPED_SEQUENCES, clip_values, clipped
from r1zero.algo.losses import policy_loss

if TYPE_CHECKING:
    from r1zero.algo.loss_batch import LossBatch
    from r1zero.algo.losses import TokenLoss

# A ratio of a sequence moves far less than that of a token: section 5.1 of the paper has these.
# 10 to 30% of clipped sequences are usual.
CLIP_LOW = 3e-4
CLIP_HIGH = 4e-4


@policy_loss(
    stats=CLIPPED_SEQUENCES,
    aggregations=("sequence_mean",),
    limits={"clip_low": (0, 1), "clip_high": (0, 100)},
    ratio="sequence",
)
def gspo(
    batch: LossBatch, *, clip_low: float = CLIP_LOW, clip_high: float = CLIP_HIGH
) -> TokenLoss:
    """All tokens of a response are clipped together or not at all, if they share one advantage."""
    ratio = batch.sequence_ratio(batch.log_ratio())
    losses, low, high = clipped(ratio, batch.advantages, clip_low, clip_high)
    return losses, clip_values(low, high)
