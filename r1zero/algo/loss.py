"""The loss of one microbatch: policy loss + KL - entropy, aggregated; sums of its statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from r1zero.algo.correction import correction_weights, importance_ratio, mismatch
from r1zero.algo.kl import kl_penalty, log_ratio_to_reference
from r1zero.algo.loss_batch import LossBatch
from r1zero.algo.objective import Objective
from r1zero.algo.stats import (
    ENTROPY,
    ENTROPY_COEFFICIENT,
    FIRST_DRIFT,
    IMPORTANCE,
    IMPORTANCE_RATIO,
    KL,
    KL_COEFFICIENT,
    LOSS,
    MISMATCH,
    MISMATCH_KL,
    MISMATCH_MAX,
    MISMATCH_OF_SEQUENCES,
    REJECTED,
    TRUNCATED,
    Stat,
)
from r1zero.config.schema import Correction
from r1zero.types import Reduce, Tally


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What is added to the policy loss of each token, and what weighs it."""

    kl_estimator: str
    kl_coefficient: float
    entropy_coefficient: float
    kl_in: str = "loss"  # or "reward"
    correction: Correction = field(default_factory=Correction)
    stale: bool = False  # other weights drew the tokens than learn first


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
    weight that corrects a token for the engine that drew it, and its c of the aggregation, which
    weighs the three terms of a token alike. With the KL in the reward it lowers the advantage of
    the token instead. The sums are detached.
    """
    kl = torch.zeros_like(batch.logprobs)
    kl_term = kl
    if batch.ref_logprobs is not None:
        kl = kl_penalty(batch.logprobs, batch.ref_logprobs, terms.kl_estimator)
        if terms.kl_in == "reward":
            batch = _with_kl_in_reward(batch, batch.ref_logprobs, terms.kl_coefficient)
        else:
            kl_term = terms.kl_coefficient * kl
    policy, own = objective.loss(batch, **objective.settings)
    weights = correction_weights(batch, terms.correction, terms.stale)
    losses = weights.values * policy + kl_term - terms.entropy_coefficient * batch.entropy
    loss = (losses * batch.weights).sum()
    with torch.no_grad():
        values = {
            LOSS.key: losses,
            KL.key: kl,
            ENTROPY.key: batch.entropy,
            FIRST_DRIFT.key: (batch.ratio() - 1).abs(),
            IMPORTANCE.key: weights.values,
            TRUNCATED.key: weights.bounded.to(kl.dtype),
            REJECTED.key: weights.rejected.to(kl.dtype),
            KL_COEFFICIENT.key: torch.full_like(kl, terms.kl_coefficient),
            ENTROPY_COEFFICIENT.key: torch.full_like(kl, terms.entropy_coefficient),
        }
        values |= _mismatch_values(batch)
        sums = _sums(batch, objective.loss.all_stats, values | own)
    return loss, sums


def _with_kl_in_reward(
    batch: LossBatch, ref_logprobs: torch.Tensor, coefficient: float
) -> LossBatch:
    """Punish each token for its log-ratio to the reference, which is the gradient of the KL."""
    punishment = coefficient * log_ratio_to_reference(batch.logprobs, ref_logprobs)
    return replace(batch, advantages=batch.advantages - punishment)


def _mismatch_values(batch: LossBatch) -> dict[str, torch.Tensor]:
    """How trainer and rollout engine differ, before any correction, for each token [R]."""
    log_ratio = mismatch(batch)
    ratio = importance_ratio(batch)
    of_sequences = batch.to_tokens(batch.sequence_mean(log_ratio))
    return {
        MISMATCH.key: log_ratio.abs(),
        MISMATCH_MAX.key: log_ratio.abs(),
        MISMATCH_KL.key: ratio - 1 - log_ratio,  # k3 of KL(rollout engine || trainer)
        MISMATCH_OF_SEQUENCES.key: of_sequences.abs(),
        IMPORTANCE_RATIO.key: ratio,
    }


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
