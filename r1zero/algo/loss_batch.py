"""LossBatch: what a policy loss sees of a microbatch, responses laid end to end (cu_seqlens)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Beyond these a log-ratio has no gradient: its exponential would overflow, or drown the others of a
# minibatch. Of a token, and of the mean over a response.
MAX_LOG_RATIO = 20.0
MAX_MEAN_LOG_RATIO = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LossBatch:
    """The R response tokens of one microbatch, sample after sample. fp32 [R] unless said otherwise.

    The responses [a b c] and [d e] give R = 5 and cu_seqlens [0 3 5]: the tokens of sample i lie at
    cu_seqlens[i] up to cu_seqlens[i + 1]. Log-probs are at the sampling temperature.

    The weights are those of the aggregation (algo/aggregation.py): fixed before the first forward
    pass, for the whole update and over all ranks, so the parts of all microbatches add up. Where
    gradients of a whole global batch are accumulated while it is drawn, its denominator is not known
    yet: the weights are not divided by it, and the sum is at the end.
    """

    logprobs: torch.Tensor  # of the policy that learns, with gradient
    entropy: torch.Tensor  # of its distribution, with gradient
    # of the weights that the ratio is taken to: by the trainer, or those of the rollout engine
    old_logprobs: torch.Tensor
    trainer_logprobs: torch.Tensor  # of the weights that learn first, by the trainer
    ref_logprobs: torch.Tensor | None  # of the reference; None: there is none
    rollout_logprobs: torch.Tensor  # of the weights that drew the tokens, by the rollout engine
    advantages: torch.Tensor
    mask: torch.Tensor  # 1 for tokens that the loss counts, else 0
    cu_seqlens: torch.Tensor  # int32 [samples + 1]
    weights: torch.Tensor  # in the loss of the update; 0 for tokens that it leaves out

    def log_ratio(self) -> torch.Tensor:
        """log(p / p_old) of each token, with gradient: [R]."""
        return self.logprobs - self.old_logprobs

    def ratio(self) -> torch.Tensor:
        """p / p_old of each token, with gradient: [R]. Its logarithm is held to +-20."""
        return torch.exp(self.log_ratio().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))

    def sequence_ratio(self, log_ratios: torch.Tensor) -> torch.Tensor:
        """exp(mean over a response of `log_ratios`) at each of its tokens: [R] -> [R].

        Equal for all tokens of a response, but the gradient of a token is that of its own log-ratio:
        averaged over the tokens, they are the gradient of the exponential of the mean. The mean is
        held to 10 from above.
        """
        mean = self.to_tokens(self.sequence_mean(log_ratios)).detach()
        own = log_ratios - log_ratios.detach()  # 0, with a gradient
        return torch.exp((mean + own).clamp(max=MAX_MEAN_LOG_RATIO))

    def sequence_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the tokens of each sample that the mask leaves: [R] -> [samples]."""
        sums = values.new_zeros(len(self.cu_seqlens) - 1)
        return sums.index_add(0, self._sample_of_token(), values * self.mask)

    def sequence_mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the tokens that the mask leaves, 0 if it leaves none: [R] -> [samples]."""
        return self.sequence_sum(values) / self.sequence_tokens().clamp(min=1)

    def sequence_tokens(self) -> torch.Tensor:
        """Tokens of each sample that the mask leaves: fp32 [samples]."""
        return self.sequence_sum(torch.ones_like(self.mask))

    def to_tokens(self, per_sequence: torch.Tensor) -> torch.Tensor:
        """Repeat the value of a sample at each of its tokens: [samples] -> [R]."""
        return per_sequence[self._sample_of_token()]

    def _sample_of_token(self) -> torch.Tensor:
        """Sample that each token belongs to: [0 0 0 1 1] in the example. int64 [R]."""
        # not repeat_interleave, which has no kernel in the oldest torch_npu that is supported
        tokens = torch.arange(len(self.mask), device=self.mask.device)
        return torch.bucketize(tokens, self.cu_seqlens[1:].long(), right=True)
