"""An own aggregation: a sum with a constant denominator (Dr. GRPO).

Source: arXiv:2503.20783, section 3.2.

algorithm:
  aggregation: examples/aggregation_constant.py:constant
"""

from __future__ import annotations

import torch

from r1zero.algo.loss_batch import LossBatch

LENGTH = 1024  # tokens that every response is divided by: the response budget


def constant(losses: torch.Tensor, batch: LossBatch) -> torch.Tensor:
    """From the loss of each token of a microbatch, [R], to its part of the minibatch loss."""
    return (losses * batch.mask).sum() / (batch.num_sequences * LENGTH)
