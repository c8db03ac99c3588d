"""The loss of one microbatch: policy loss + KL - entropy, aggregated; sums of its statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from r1zero.algo.correction import importance_weights
from r1zero.algo.kl import kl_penalty
from r1zero.algo.loss_batch import LossBatch
from r1zero.algo.objective import Objective
from r1zero.algo.stats import (
    ENTROPY,
    FIRST_DRIFT,
    IMPORTANCE,
    KL,
    LOSS,
    MISMATCH,
    MISMATCH_MAX,
    TRUNCATED,
    Stat,
)
from r1zero.types import Reduce, Tally


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What is added to the policy loss of each token."""

    kl_estimator: str
    kl_coefficient: float
    entropy_coefficient: float
    importance_cap: float | None = None  # of importance weights; None: there are none


@dataclass(frozen=True, slots=True)
class Sums:
    """Statistics of some response tokens, in a form that adds up over microbatches and ranks."""

    added: (
        torch.Tensor
    )  # [2 + means]: tokens, sequences, then the sum of each statistic that is a mean
    largest: torch.Tensor  # [maxima], at least 0

    @classmethod
    def zeros(cls, stats: Sequence[Stat]) -> Sums:
        """Of no tokens at all, fp64 on the CPU."""
        maxima = sum(stat.reduce is Reduce.MAX for stat in stats)
        added = torch.zeros(2 + len(stats) - maxima, dtype=torch.float64)
        return cls(added, torch.zeros(maxima, dtype=torch.float64))

    @classmethod
    def join(cls, parts: Sequence[Sums]) -> Sums:
        """Of several microbatches, fp64 on the CPU."""
        added = torch.stack([part.added for part in parts]).cpu().double().sum(0)
        largest = torch.stack([part.largest for part in parts]).cpu().double().amax(0)
        return cls(added, largest)

    def tallies(self, stats: Sequence[Stat]) -> dict[str, Tally]:
        """Name the statistics by their keys in metrics.jsonl."""
        tokens, sequences, *sums = self.added.tolist()
        sums_left = iter(sums)
        largest_left = iter(self.largest.tolist())
        found = {}
        for stat in stats:
            if stat.reduce is Reduce.MAX:
                found[stat.key] = Tally(stat.reduce, next(largest_left), 0)
            else:
                if stat.reduce is Reduce.TOKEN_MEAN:
                    count = tokens
                else:
                    count = sequences
                found[stat.key] = Tally(stat.reduce, next(sums_left), round(count))
        return found

    @property
    def tokens(self) -> int:
        """Response tokens that the mask left."""
        return round(self.added[0].item())


def microbatch_loss(
    batch: LossBatch, objective: Objective, terms: LossTerms
) -> tuple[torch.Tensor, Sums]:
    """Return this microbatch's part of the minibatch loss, and the sums of all statistics, fp32.

    loss = sum of c * (weight * policy loss + kl_coefficient KL - entropy_coefficient H), with the
    importance weight of each token and its c of the aggregation, which weighs the three terms of a
    token alike. The sums are detached.
    """
    policy, own = objective.loss(batch, **objective.settings)
    kl = torch.zeros_like(batch.logprobs)
    if batch.ref_logprobs is not None:
        kl = kl_penalty(batch.logprobs, batch.ref_logprobs, terms.kl_estimator)
    weight, truncated = importance_weights(
        batch.old_logprobs, batch.rollout_logprobs, terms.importance_cap
    )
    losses = weight * policy + terms.kl_coefficient * kl - terms.entropy_coefficient * batch.entropy
    loss = (losses * batch.weights).sum()
    with torch.no_grad():
        mismatch = (batch.trainer_logprobs - batch.rollout_logprobs).abs()
        values = {
            LOSS.key: losses,
            KL.key: kl,
            ENTROPY.key: batch.entropy,
            FIRST_DRIFT.key: (batch.ratio() - 1).abs(),
            MISMATCH.key: mismatch,
            MISMATCH_MAX.key: mismatch,
            IMPORTANCE.key: weight,
            TRUNCATED.key: truncated,
        }
        sums = _sums(batch, objective.loss.all_stats, values | own)
    return loss, sums


def _sums(batch: LossBatch, stats: Sequence[Stat], values: Mapping[str, torch.Tensor]) -> Sums:
    """Reduce the values of the tokens [R] as their statistics say."""
    added = [batch.mask.sum(), (batch.sequence_tokens() > 0).float().sum()]
    largest = []
    for stat in stats:
        value = values[stat.key].detach()
        if stat.reduce is Reduce.TOKEN_MEAN:
            added.append((value * batch.mask).sum())
        elif stat.reduce is Reduce.SEQUENCE_MEAN:
            added.append(batch.sequence_mean(value).sum())
        else:
            largest.append((value * batch.mask).max())
    return Sums(torch.stack(added), torch.stack(largest))
