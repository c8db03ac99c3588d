"""The GRPO loss of one microbatch (DeepSeekMath, arXiv:2402.03300, eq. 3, token mean over the
minibatch)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from r1zero.algo.kl import kl_penalty


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What the loss is made of, besides the tokens."""

    clip_low: float  # the ratio is held to [1 - clip_low, 1 + clip_high]
    clip_high: float
    kl_estimator: str
    kl_coefficient: float
    entropy_coefficient: float


# Sums over response tokens that `grpo_loss` returns beside the loss, in this order.
STATS = ("loss", "kl", "entropy", "clipped", "drift", "mismatch", "tokens")


def grpo_loss(
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    denominator: int,
    terms: LossTerms,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This microbatch's part of the minibatch loss. All inputs fp32 [R], one entry a response
    token.

    loss = sum_t mask (max(-A r, -A clip(r)) + kl_coefficient KL - entropy_coefficient H) /
    denominator with r = exp(log p - old log p). `denominator` counts the response tokens of the
    whole minibatch over all ranks, so the parts of all microbatches add up to one token mean
    however they are cut. Returns (loss, sums as in STATS, fp32 [7], detached).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped_ratio = ratio.clamp(1 - terms.clip_low, 1 + terms.clip_high)
    plain = -advantages * ratio
    clipped = -advantages * clipped_ratio
    kl = kl_penalty(logprobs, ref_logprobs, terms.kl_estimator)
    per_token = (
        torch.maximum(plain, clipped)
        + terms.kl_coefficient * kl
        - terms.entropy_coefficient * entropy
    )
    loss = (per_token * mask).sum() / denominator
    with torch.no_grad():
        mismatch = (old_logprobs - rollout_logprobs).abs()
        columns = [
            per_token,
            kl,
            entropy,
            (clipped > plain).float(),
            (ratio - 1).abs(),
            mismatch,
            torch.ones_like(mask),
        ]
        sums = torch.stack([(column * mask).sum() for column in columns])
    return loss, sums
