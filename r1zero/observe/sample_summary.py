"""Summaries of samples: each rollout replica makes one of its own, the controller joins them.

Sums are exact fractions, so what is told does not depend on how many replicas drew the samples.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from r1zero.algo.selection import PUT_OFF, agreement, applied, count_right, rewards_equal
from r1zero.observe.model_summary import join_models, summarize_model
from r1zero.scores import MODEL
from r1zero.types import (
    Group,
    Outcome,
    Sample,
    SampleSummary,
    Score,
    ScoreSummary,
    SourceSummary,
)

REASONS = 8  # different ones of failed scores, from a replica


def summarize(
    groups: Sequence[Group],
    unused: Sequence[range] = (),
    verdict_functions: Sequence[str] = (),
) -> SampleSummary:
    """Sum up scored groups. `unused` are ids that stand for no token, `verdict_functions` those whose
    scores say whether a response is right. AssertionError for a sample without a reward."""
    judged_tokens = _judged_tokens(groups)
    put_off = [group for group in groups if group.dropped == PUT_OFF]
    groups = [group for group in groups if group.dropped != PUT_OFF]
    samples = [sample for group in groups for sample in group.samples]
    rewards = [group.rewards for group in groups]
    training = [sample for group in groups for sample in group.training]
    failures = Counter(sample.failure for sample in samples if sample.failed)
    return SampleSummary(
        groups=len(groups),
        equal_groups=sum(map(rewards_equal, groups)),
        agreements=Counter(agreement(group, verdict_functions) for group in groups),
        dropped=Counter(group.dropped for group in groups if not group.trains),
        judged_tokens=judged_tokens,
        put_off=len(put_off),
        put_off_tokens=sum(len(sample.tokens) for group in put_off for sample in group.samples),
        samples=len(samples),
        reward=_exact_sum(reward for found in rewards for reward in found),
        scores=_scores(samples),
        copied=sum(_is_copied(sample) for sample in samples),
        failed=failures.total(),
        reasons=Counter(dict(failures.most_common(REASONS))),
        prompt_tokens=sum(len(group.prompt.tokens) * len(group.samples) for group in groups),
        response_tokens=sum(len(sample.tokens) for sample in samples),
        longest=max((len(sample.tokens) for sample in samples), default=0),
        truncated=sum(sample.truncated for sample in samples),
        versions=Counter(sample.version for sample in samples),
        training_tokens=sum(len(sample.tokens) for sample in training),
        unmasked_tokens=sum(int(sample.mask.sum()) for sample in training),
        unused_ids=sum(_count_unused(sample.tokens, unused) for sample in samples),
        sources=_sources(groups, verdict_functions),
        model=summarize_model(groups),
    )


def join_summaries(parts: Sequence[SampleSummary]) -> SampleSummary:
    """The summary of all samples, from those of the replicas in order."""
    return SampleSummary(
        groups=sum(part.groups for part in parts),
        equal_groups=sum(part.equal_groups for part in parts),
        agreements=sum((part.agreements for part in parts), Counter()),
        dropped=sum((part.dropped for part in parts), Counter()),
        judged_tokens=sum(part.judged_tokens for part in parts),
        put_off=sum(part.put_off for part in parts),
        put_off_tokens=sum(part.put_off_tokens for part in parts),
        samples=sum(part.samples for part in parts),
        reward=sum((part.reward for part in parts), Fraction()),
        scores=_join_scores(parts),
        copied=sum(part.copied for part in parts),
        failed=sum(part.failed for part in parts),
        reasons=sum((part.reasons for part in parts), Counter()),
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        response_tokens=sum(part.response_tokens for part in parts),
        longest=max(part.longest for part in parts),
        truncated=sum(part.truncated for part in parts),
        versions=sum((part.versions for part in parts), Counter()),
        training_tokens=sum(part.training_tokens for part in parts),
        unmasked_tokens=sum(part.unmasked_tokens for part in parts),
        unused_ids=sum(part.unused_ids for part in parts),
        sources=_join_sources(parts),
        surplus_tokens=sum(part.surplus_tokens for part in parts),
        model=join_models([part.model for part in parts]),
    )


def _scores(samples: Sequence[Sample]) -> dict[str, ScoreSummary]:
    """By reward function, of the samples that it scored."""
    by_function: defaultdict[str, list[Score]] = defaultdict(list)
    for sample in samples:
        for name, score in sample.scores.items():
            by_function[name].append(score)
    found = {}
    for name, scores in by_function.items():
        values = [score.value for score in scores if _counts(name, score)]
        outcomes = Counter(score.outcome for score in scores)
        found[name] = ScoreSummary(_exact_sum(values), len(values), outcomes)
    return found


def _counts(name: str, score: Score) -> bool:
    """Whether a value is part of the mean of its function. A failed rule has the value of a wrong
    answer; values of a reward model have no level, so there is none for what it could not read."""
    return name != MODEL or not score.outcome.failed


def _sources(groups: Sequence[Group], verdict_functions: Sequence[str]) -> dict[str, SourceSummary]:
    """By data set, of those that have names. A response is right if all functions say so that do."""
    by_source: defaultdict[str, list[Group]] = defaultdict(list)
    for group in groups:
        if group.prompt.source:
            by_source[group.prompt.source].append(group)
    found = {}
    for source, mine in by_source.items():
        samples = [sample for group in mine for sample in group.samples]
        judged = [group for group in mine if applied(group, verdict_functions)]
        found[source] = SourceSummary(
            samples=len(samples),
            reward=_exact_sum(sample.reward for sample in samples),
            judged=sum(len(group.samples) for group in judged),
            right=sum(count_right(group, applied(group, verdict_functions)) for group in judged),
            response_tokens=sum(len(sample.tokens) for sample in samples),
        )
    return found


def _join_sources(parts: Sequence[SampleSummary]) -> dict[str, SourceSummary]:
    found: dict[str, SourceSummary] = {}
    for source in dict.fromkeys(source for part in parts for source in part.sources):
        mine = [part.sources[source] for part in parts if source in part.sources]
        found[source] = SourceSummary(
            samples=sum(each.samples for each in mine),
            reward=sum((each.reward for each in mine), Fraction()),
            judged=sum(each.judged for each in mine),
            right=sum(each.right for each in mine),
            response_tokens=sum(each.response_tokens for each in mine),
        )
    return found


def _join_scores(parts: Sequence[SampleSummary]) -> dict[str, ScoreSummary]:
    """A replica without samples knows of no reward function."""
    found: dict[str, ScoreSummary] = {}
    for part in parts:
        for name, more in part.scores.items():
            so_far = found.get(name, ScoreSummary(Fraction(), 0, Counter()))
            found[name] = ScoreSummary(
                so_far.total + more.total,
                so_far.counted + more.counted,
                so_far.outcomes + more.outcomes,
            )
    return found


def _exact_sum(values: Iterable[float]) -> Fraction:
    """The sum without rounding; most values come many times, so each is added once."""
    counts = Counter(values)
    return sum((Fraction(value) * times for value, times in counts.items()), Fraction())


def _judged_tokens(groups: Sequence[Group]) -> int:
    samples = [sample for group in groups for sample in group.samples]
    return sum(len(sample.tokens) for sample in samples if MODEL in sample.scores)


def _is_copied(sample: Sample) -> bool:
    return any(score.outcome is Outcome.COPIED for score in sample.scores.values())


def _count_unused(tokens: np.ndarray, unused: Sequence[range]) -> int:
    """Those of the token ids [T] that lie in one of these ranges."""
    return sum(int(((tokens >= ids.start) & (tokens < ids.stop)).sum()) for ids in unused)
