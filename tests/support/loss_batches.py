"""A LossBatch from a few lists, for losses and what stands around them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from r1zero.algo.loss_batch import LossBatch
from r1zero.algo.losses import LOSSES
from r1zero.algo.objective import Objective, choose_objective

CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def loss_batch(
    logprobs: Sequence[float],
    old: Sequence[float],
    advantages: Sequence[float],
    lengths: Sequence[int],
    *,
    mask: Sequence[float] | None = None,
    rollout: Sequence[float] | None = None,
    ref: Sequence[float] | None = None,
    aggregation: str = "token_mean",
) -> LossBatch:
    """Responses of these lengths end to end, which are the whole update; engine and reference agree
    with `old` unless said otherwise."""
    old_logprobs = torch.tensor(old)
    marks = torch.ones(len(logprobs)) if mask is None else torch.tensor(mask)
    if aggregation == "token_mean":
        weights = marks / marks.sum()
    else:
        assert aggregation == "sequence_mean" and mask is None, aggregation
        weights = torch.tensor(
            np.repeat([1 / length / len(lengths) for length in lengths], lengths)
        )
    return LossBatch(
        logprobs=torch.tensor(logprobs, requires_grad=True),
        entropy=torch.zeros(len(logprobs)),
        old_logprobs=old_logprobs,
        trainer_logprobs=old_logprobs,
        ref_logprobs=old_logprobs if ref is None else torch.tensor(ref),
        rollout_logprobs=old_logprobs if rollout is None else torch.tensor(rollout),
        advantages=torch.tensor(advantages),
        mask=marks,
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        weights=weights.float(),
    )


def objective_with(loss: str, aggregation: str | None = None, **settings: float) -> Objective:
    """A built-in loss; bounds that it takes from older keys are 0.2."""
    return choose_objective(loss, settings, CLIP, aggregation, "group_norm", {})


def with_sequence_mean(loss: str) -> Objective:
    """A loss with the one aggregation that goes with all of them."""
    assert not LOSSES[loss].aggregations or "sequence_mean" in LOSSES[loss].aggregations
    return objective_with(loss, "sequence_mean")
