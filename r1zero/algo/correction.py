"""Correction of the mismatch between the rollout engine, which draws, and the trainer.

Engine and trainer give a token log-probs that differ: by rounding, or because other weights drew it.
w = p_old / p_rollout weighs its policy loss, so that the gradient is again one over tokens of the
trainer's own distribution; bounds keep a few tokens from ruling it. Off unless asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from r1zero.algo.loss_batch import MAX_LOG_RATIO, LossBatch
from r1zero.config.schema import Correction


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the policy loss of R tokens. No gradient."""

    values: torch.Tensor  # fp32 [R]
    bounded: torch.Tensor  # bool [R]: cut off, or set to 0
    rejected: torch.Tensor  # bool [R]: token of a response that has no policy loss


def importance_ratio(batch: LossBatch) -> torch.Tensor:
    """w = p_old / p_rollout of each token by the trainer's log-probs, whose logarithm is held to
    +-20: fp32 [R], no gradient."""
    return mismatch(batch).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def mismatch(batch: LossBatch) -> torch.Tensor:
    """log w of each token: fp32 [R], no gradient."""
    return (batch.trainer_logprobs - batch.rollout_logprobs).detach()


def correction_weights(batch: LossBatch, correction: Correction, stale: bool) -> Weights:
    """The weights of a microbatch; `stale`: other weights drew the tokens than learn first.

    A rejected response has the weights 0: it only leaves, denominators count it as before.
    """
    ratio = importance_ratio(batch)
    values, bounded = _of_tokens(ratio, correction, correction.weights_for(stale))
    rejected = _rejected(batch, ratio, correction)
    return Weights(values.masked_fill(rejected, 0.0), bounded, rejected)


def _of_tokens(
    ratio: torch.Tensor, correction: Correction, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight of each token [R], and whether a bound made it another than `ratio`.

    clip: TIS, Espeholt et al. 2018 (IMPALA, arXiv:1802.01561), section 4.1, one factor a token.
    mask: IcePop, arXiv:2510.18855, the discrepancy mask.
    """
    if kind == "clip":
        return ratio.clamp(max=correction.cap), ratio > correction.cap
    if kind == "mask":
        outside = (ratio < correction.low) | (ratio > correction.high)
        return ratio.masked_fill(outside, 0.0), outside
    assert kind == "none", kind
    return torch.ones_like(ratio), torch.zeros_like(ratio, dtype=torch.bool)


def _rejected(batch: LossBatch, ratio: torch.Tensor, correction: Correction) -> torch.Tensor:
    """Whether a token's response is rejected, by the tokens that the loss mask leaves: bool [R].

    sequence: by the geometric mean. The product would shrink or grow with the length: with 0.05
    nats a token and 1000 tokens its logarithm has a standard deviation of 1.6.
    """
    if correction.reject == "sequence":
        mean = batch.to_tokens(batch.sequence_mean(ratio.log())).exp()
        return (mean < correction.reject_low) | (mean > correction.reject_high)
    if correction.reject == "token":
        vetoes = batch.sequence_sum((ratio < correction.veto).to(ratio.dtype))
        return batch.to_tokens(vetoes) > 0
    assert correction.reject == "none", correction.reject
    return torch.zeros_like(ratio, dtype=torch.bool)
