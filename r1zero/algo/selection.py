"""Group selection (filtering, dynamic sampling): what is learnt from, decided between reward and reference.

A group that does not train keeps its place in the batch: it is counted in the metrics of rewards,
written with the samples, and in the denominators of the loss. Neither the reference nor the policy
looks at its tokens, which stay on the rollout ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from r1zero.scores import rules_count
from r1zero.types import Agreement, Batch, Group, Outcome, Sample

# Why a group does not train: values of Group.dropped.
EQUAL = "equal"
ACCURACY = "accuracy"
PUT_OFF = "put_off"  # not all of its responses ended below the limit of a short step
TRUNCATED = "truncated"  # all of its samples
SURPLUS = "surplus"  # kept, but the batch was full; told once that is known


class GroupSelector(Protocol):
    """Decides on the rollout ranks, each for the groups that its replica drew."""

    def select(self, batch: Batch, groups: list[Group]) -> list[Group]:
        """Set `trains` and `dropped` of each group, whose rewards are known, and `trains` of each
        sample; return all of them.

        The decision about a group may depend on that group only: other replicas hold the others.
        """


class AllGroups:
    """Everything trains."""

    def select(self, batch: Batch, groups: list[Group]) -> list[Group]:
        return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class TeachingGroups:
    """Groups train that teach something, and samples that ended by themselves."""

    verdict_functions: Sequence[str]  # reward functions that say whether a response is right
    with_rules: bool = True  # they count where a prompt does not say
    equal_groups: Literal["keep", "skip", "replace"]
    accuracy: tuple[float, float] | None  # least and largest share of right answers
    mask_truncated: bool

    def select(self, batch: Batch, groups: list[Group]) -> list[Group]:
        """See GroupSelector. What a checkpoint held is decided anew, by the keys of today."""
        for group in groups:
            for sample in group.samples:
                sample.trains = not (self.mask_truncated and sample.truncated)
            group.dropped = self._reason(group)
            if _has_not_ended(group, batch.response_limit):
                group.dropped = PUT_OFF  # whatever else holds for it: it is drawn once more
            group.trains = not group.dropped
        return groups

    def _reason(self, group: Group) -> str:
        """Why the group does not train, "" if it does. A failed score says nothing about a
        response, so a group with one is kept."""
        if not any(sample.trains for sample in group.samples):
            return TRUNCATED
        verdict_functions = self._judges(group)
        found = agreement(group, verdict_functions)
        if found is Agreement.FAILED:
            return ""
        if found is not Agreement.MIXED:
            # by rewards that differ a skipped group would have had an advantage
            if self.equal_groups == "replace":
                return EQUAL
            if self.equal_groups == "skip" and rewards_equal(group):
                return EQUAL
        functions = applied(group, verdict_functions)
        if self.accuracy is not None and functions:
            low, high = self.accuracy
            if not low <= accuracy(group, functions) <= high:
                return ACCURACY
        return ""

    def _judges(self, group: Group) -> Sequence[str]:
        """The functions whose verdicts say what a group teaches: none where its rewards are those of a
        reward model alone."""
        if rules_count(group.prompt.category, self.with_rules):
            return self.verdict_functions
        return ()


def _has_not_ended(group: Group, limit: int | None) -> bool:
    """Whether a response of the group was stopped at the limit of a short step."""
    if limit is None:
        return False
    return any(sample.truncated and len(sample.tokens) >= limit for sample in group.samples)


def agreement(group: Group, verdict_functions: Sequence[str]) -> Agreement:
    """What the verdicts on a group's responses have in common; without a reward function that gives
    one, its rewards.

    Not of the rewards otherwise: with `overlong` or `length` hardly two of them are equal. A response
    without an answer is wrong.
    """
    if any(sample.failed for sample in group.samples):
        return Agreement.FAILED
    verdict_functions = applied(group, verdict_functions)
    if not verdict_functions:
        return Agreement.ALIKE if rewards_equal(group) else Agreement.MIXED
    verdicts = {_rights(sample, verdict_functions) for sample in group.samples}
    if len(verdicts) > 1:
        return Agreement.MIXED
    [rights] = verdicts
    if all(rights):
        return Agreement.ALL_RIGHT
    if not any(rights):
        return Agreement.ALL_WRONG
    return Agreement.ALIKE  # functions of two minds


def applied(group: Group, verdict_functions: Sequence[str]) -> list[str]:
    """Those of the functions that scored the group: a data set may have functions of its own."""
    return [name for name in verdict_functions if name in group.samples[0].scores]


def accuracy(group: Group, verdict_functions: Sequence[str]) -> float:
    """The share of responses that every function calls right."""
    return count_right(group, verdict_functions) / len(group.samples)


def count_right(group: Group, verdict_functions: Sequence[str]) -> int:
    """The number of responses that every function calls right."""
    return sum(all(_rights(sample, verdict_functions)) for sample in group.samples)


def rewards_equal(group: Group) -> bool:
    """Whether all rewards of the group are the same number."""
    return len(set(group.rewards)) == 1


def _rights(sample: Sample, verdict_functions: Sequence[str]) -> tuple[bool, ...]:
    """Whether a response is right, as each function says."""
    return tuple(sample.scores[name].outcome is Outcome.RIGHT for name in verdict_functions)
