"""Estimators of the divergence from the reference policy, per token, and its coefficient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Log-ratios beyond this would overflow the exponential of `k3` and drown the batch, in its
# value and in the gradient of all.
MAX_LOG_RATIO = 20.0
MAX_KL = 10.0


OLDER_NAMES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}


def kl_penalty(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str) -> torch.Tensor:
    """Penalty for each token, any shape: the value of the estimator, the gradient of KL(policy ||
    reference).

    With d = log p - log ref the values are (http://joschu.net/blog/kl-approx.html): `k1` d, `abs`
    |d|, `k2` d^2 / 2, `k3` exp(-d) - 1 + d, with d held to +-20 and the result to 10. `kl`, `mse`
    and `low_var_kl` are older names of k1, k2 and k3.

    The gradient is d grad log p for each of them, with d held to +-20. Its mean over tokens that
    the policy draws is the gradient of the KL (that of `k2` is the same). The own gradients of the
    others are not: `k1`'s has mean 0 and holds nothing, `k3`'s is that of KL(reference || policy),
    `abs`'s that of neither (arXiv:2506.09477).
    """
    d = (logprobs - ref_logprobs).detach()
    # 0, and d for the gradient
    pull = log_ratio_to_reference(logprobs, ref_logprobs) * (logprobs - logprobs.detach())
    return _value(d, OLDER_NAMES.get(estimator, estimator)) + pull


def log_ratio_to_reference(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """d = log p - log ref of each token, held to +-20, without gradient: any shape.

    As a punishment in a token's reward its gradient, d grad log p, is that of `kl_penalty`.
    """
    return (logprobs - ref_logprobs).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _value(d: torch.Tensor, estimator: str) -> torch.Tensor:
    """What the estimator says of log-ratios."""
    if estimator == "k1":
        return d
    if estimator == "abs":
        return d.abs()
    if estimator == "k2":
        return 0.5 * d.square()
    assert estimator == "k3", estimator
    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (torch.exp(-d) - 1 + d).clamp(max=MAX_KL)


@dataclass
class KLCoefficient:
    """Weight of the penalty: fixed, or steered towards `target` (arXiv:1909.08593, section 2.2)."""

    value: float
    target: float | None = None  # None: fixed
    # in samples; a shorter one than a step's samples counts as that step
    horizon: int | None = None

    @property
    def kept(self) -> float | None:
        """What a checkpoint keeps: None if it is fixed, as the configuration then says it."""
        return None if self.target is None else self.value

    def restore(self, value: float | None) -> None:
        """Go on from a checkpoint; None: it was fixed there."""
        if self.target is not None and value is not None:
            self.value = value

    def update(self, measured: float, num_samples: int) -> None:
        """Move towards the target after a step in which `measured` was the mean penalty per
        token."""
        if self.target is None:
            return
        assert self.horizon
        error = min(max(measured / self.target - 1, -0.2), 0.2)
        # beyond 5 horizons the value would turn negative
        share = min(1.0, num_samples / self.horizon)
        self.value *= 1 + error * share
