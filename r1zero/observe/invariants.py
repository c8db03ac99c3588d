"""What must hold in every step, whatever the model does. A sentence for each that does not.

A broken one means a fault of the machinery - weights that did not arrive, samples lost on the way,
old log-probs of other weights - and rewards that look plausible all the same. So they are looked at
in every step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from r1zero.algo.stats import FIRST_DRIFT, KL, MISMATCH
from r1zero.types import Batch, RankRecord, SampleSummary, UpdateStats, joined

# |p / p_old - 1|, a token mean over the first minibatch: both come from one forward pass, so it is 0.
RATIO_LIMIT = 1e-3


@dataclass(frozen=True, slots=True)
class Tolerances:
    """How far two computations of the same number may lie apart, as token means in nats."""

    mismatch: float  # |log p - log p of the rollout engine| in the first minibatch
    # KL to the reference in the first minibatch, when both hold the same weights: before any update
    # and after a reset
    start_kl: float

    def kl_limit(self, estimator: str) -> float:
        """`start_kl` as this estimator tells it: `abs` adds up what the others cancel or square, so
        for it rounding is as large as in the mismatch."""
        if estimator == "abs":
            return self.mismatch
        return self.start_kl


# fp32: 100 times what is seen (1e-7). bf16 carries 8 bits of log-probs near 10, and the two sides
# round at different places: 0.02 to 0.04 is seen, and its square is what a KL makes of it.
FP32 = Tolerances(1e-3, 1e-5)
BF16 = Tolerances(0.1, 1e-2)


@dataclass(frozen=True, slots=True)
class Invariants:
    """The rules of one run."""

    limits: Tolerances
    same_start: bool  # policy and reference start from the same weights
    kl_penalty: str  # estimator of the KL that is told

    def broken(
        self,
        batch: Batch,
        samples: SampleSummary,
        updates: Sequence[UpdateStats | None],
        records: Sequence[RankRecord],
    ) -> list[str]:
        """Return a sentence for everything that does not hold in this step."""
        problems = _versions(batch, samples)
        first = next((update for update in updates if update is not None), None)
        if first is not None:
            problems += self._ratio(batch, first)
        problems += _tokens(batch, samples, updates, records)
        problems += _unused(samples)
        if first is not None and self._is_reference(batch):
            problems += self._start_kl(batch, first)
        problems += _gradients([update for update in updates if update is not None])
        return problems + [record.publish_fault for record in records[:1] if record.publish_fault]

    def _ratio(self, batch: Batch, first: UpdateStats) -> list[str]:
        problems = []
        mismatch = joined([first], MISMATCH.key)
        drift = 0.0
        if FIRST_DRIFT.key in first.tallies:  # not where the ratio is taken to the rollout engine
            drift = joined([first], FIRST_DRIFT.key)
        if not drift <= RATIO_LIMIT:  # a NaN is broken, too
            problems.append(
                f"the ratio of the first minibatch differs from 1 by {drift:.2g} a token (limit "
                f"{RATIO_LIMIT:g}): its old log-probs are not those of the weights that it is "
                "trained with"
            )
        # With other weights than those that drew them, samples must have other log-probs.
        if not batch.staleness and not mismatch <= self.limits.mismatch:
            problems.append(
                "trainer and rollout engine give the tokens of the first minibatch log-probs that "
                f"differ by {mismatch:.2g} on average (limit {self.limits.mismatch:g}): they hold "
                "different weights, or compute different things with them"
            )
        return problems

    def _is_reference(self, batch: Batch) -> bool:
        """Whether the weights that learn first from a batch are those that the reference holds: at
        the start, and after a reset."""
        if batch.staleness or batch.version != batch.reference_version:
            return False
        return batch.version > 0 or self.same_start

    def _start_kl(self, batch: Batch, first: UpdateStats) -> list[str]:
        kl = joined([first], KL.key)
        limit = self.limits.kl_limit(self.kl_penalty)
        if abs(kl) <= limit:
            return []
        if batch.version > 0:
            return [
                f"after its reset the KL to the reference is {kl:.2g} in the first minibatch (limit "
                f"{limit:g}): the reference does not hold the policy's weights"
            ]
        return [
            f"before the first update the KL to the reference is {kl:.2g} (limit "
            f"{limit:g}), though actor_rollout.load and ref.load are the same: one "
            "of the two was not loaded as it is"
        ]


def _versions(batch: Batch, samples: SampleSummary) -> list[str]:
    others = [version for version in samples.versions if version != batch.version]
    if not others:
        return []
    count = samples.samples - samples.versions[batch.version]
    return [
        f"{count} of {samples.samples} samples were drawn with weights version {others[0]}, "
        f"but version {batch.version} was published: training is not on-policy"
    ]


def _unused(samples: SampleSummary) -> list[str]:
    """Nobody can see what stands for no token: neither a reward nor a reader of the samples."""
    if not samples.unused_ids:
        return []
    return [
        f"{samples.unused_ids} of {samples.response_tokens} response tokens have ids that the "
        "tokenizer knows no token for: the sampler must give them no probability"
    ]


def _gradients(updates: Sequence[UpdateStats]) -> list[str]:
    """An update by a gradient that is no number leaves no weight that is one: it must not reach a
    checkpoint."""
    return [
        f"the gradient of update {number} of {len(updates)} has the norm {update.grad_norm}: the "
        "weights are lost, go on from an earlier checkpoint"
        for number, update in enumerate(updates, start=1)
        if not math.isfinite(update.grad_norm)
    ][:1]


def _given(role: str, samples: SampleSummary) -> int:
    """Response tokens that a role is given. Any other role that counts tokens works, as ref, behind
    the selection of the groups that train."""
    if role == "rollout":
        return samples.response_tokens + samples.put_off_tokens
    if role == "reward":
        return samples.judged_tokens
    if role == "train":
        return samples.unmasked_tokens - samples.surplus_tokens
    return samples.training_tokens


def _tokens(
    batch: Batch,
    samples: SampleSummary,
    updates: Sequence[UpdateStats | None],
    records: Sequence[RankRecord],
) -> list[str]:
    """Each role must have seen as many response tokens as it is given, each of them once."""
    counted = Counter({"rollout": 0, "train": 0})
    for record in records:
        counted.update(record.tokens)
    once = len(updates) // batch.epochs  # updates of one pass over the batch
    learned = [update for update in updates[:once] if update is not None]
    counted["train"] = sum(update.tokens for update in learned)
    seen = dict(counted)
    held = {role: _given(role, samples) for role in seen}
    if seen == held:
        return []
    told = ", ".join(f"{role} ranks saw {count}" for role, count in seen.items())
    sizes = sorted(set(held.values()), reverse=True)
    return [
        f"the samples hold {' or '.join(map(str, sizes))} response tokens, but {told}: some were "
        "lost or counted twice"
    ]
