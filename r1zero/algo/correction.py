"""Correction of old samples: truncated importance weights (TIS) of tokens that other weights drew."""

from __future__ import annotations

import torch


def importance_weights(
    old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(p_old / p_rollout, cap) of each token, and 1 where it was cut off: fp32 [R] both, detached.

    Weights the loss of a token that was drawn by other weights than those that learn first
    (Espeholt et al. 2018, IMPALA, arXiv:1802.01561, section 4.1; one factor a token). All 1 without
    a cap: nothing is corrected.
    """
    if cap is None:
        return torch.ones_like(old_logprobs), torch.zeros_like(old_logprobs)
    ratio = torch.exp(old_logprobs - rollout_logprobs).detach()
    return ratio.clamp(max=cap), (ratio > cap).to(ratio.dtype)
