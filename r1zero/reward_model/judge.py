"""The reward model in the step: groups go to its ranks, their values come back.

    rollout output ranks    groups, scored by rules -> the replicas of the reward model
    reward output ranks     values                  -> the rollout output ranks, where they become rewards

Values come back because a group's samples are selected, kept and written where they were drawn. So
that no rollout rank stands still for them, those of a part are taken when the next part has been drawn:

    rollout   draws 0 | draws 1          | takes 0, draws 2          | takes 1 ...
    reward            | looks at 0       | looks at 1                | ...
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from r1zero.distributed.groups import World
from r1zero.distributed.transfer import RoleTransfer
from r1zero.observe.clock import Clock
from r1zero.reward_model.mixing import Mixing
from r1zero.scores import BY_RULES, MODEL, Outcome, Score, rules_count
from r1zero.types import Batch, Group, Part

Drawn = tuple[Part, list[Group]]
# Of the samples of a group in order; None where the model cannot read what is too long for it.
Values = list[float | None]


class GroupReader(Protocol):
    """What gives values on the ranks of the role."""

    def values(self, groups: Sequence[Group]) -> dict[int, Values]:
        """Of each group by its position, on output ranks; empty elsewhere."""


class Judge:
    """Takes part on every rank of a world that has a reward model."""

    def __init__(
        self,
        world: World,
        move: RoleTransfer,
        clock: Clock,
        mixing: Mixing,
        reader: GroupReader | None,
        limit: int,
    ) -> None:
        """`reader` is there on the ranks of the role; what it reads has `limit` tokens at most."""
        assert world.reward is not None, "a world with a reward model"
        self._rollout = world.rollout
        self._reward = world.reward
        self._move = move
        self._clock = clock
        self._mixing = mixing
        self._reader = reader
        self._limit = limit
        self._tokens = 0

    def judged(self, batch: Batch, parts: Iterable[Drawn]) -> Iterator[Drawn]:
        """Yield parts of the batch as they come, one later, with rewards on rollout output ranks."""
        waiting: Drawn | None = None
        for part, groups in parts:
            self._ask(batch, part, groups)
            if waiting is not None:
                yield self._answered(*waiting)
            waiting = (part, groups)
        if waiting is not None:
            yield self._answered(*waiting)

    def take_tokens(self) -> int:
        """Response tokens that were looked at since the last call, where values appear; on rollout
        output ranks those whose values a checkpoint held."""
        tokens = self._tokens
        self._tokens = 0
        return tokens

    def _ask(self, batch: Batch, part: Part, groups: list[Group]) -> None:
        """Send a part to the reward model, which looks at it and sends the values back."""
        positions = part.positions
        if self._rollout.is_output_rank:
            self._tokens += _tokens(group for group in groups if MODEL in group.samples[0].scores)
        with self._clock.span("wait"):
            asked = self._move.send_to_replicas(
                batch,
                [_whole(group) for group in groups if _is_open(group)],
                positions,
                self._rollout,
                self._reward,
            )
        if self._reader is None:
            return
        with self._clock.span("reward_model"):
            values = self._reader.values(asked)
        if self._reward.is_output_rank:
            _check_finite(values)
            self._tokens += _tokens(asked)
            self._move.send_values(batch, values, positions, self._reward, self._rollout)

    def _answered(self, part: Part, groups: list[Group]) -> Drawn:
        """Take the values of a part, and make rewards of them."""
        if not self._rollout.is_output_rank:
            return part, groups
        with self._clock.span("wait"):
            values = self._move.receive_values(part.positions, self._reward, self._rollout)
        for group in groups:
            if group.position in values:
                self._reward_with(group, values[group.position])
            self._append_value(group)
        return part, groups

    def _reward_with(self, group: Group, values: Values) -> None:
        """Note the values of a group, and add them to what the rules said, or put them in its place."""
        parts = self._mixing.parts(values)
        with_rules = self._with_rules(group)
        for sample, value, part in zip(group.samples, values, parts, strict=True):
            sample.scores[MODEL] = self._score(value)
            sample.reward = sample.reward + part if with_rules else part

    def _with_rules(self, group: Group) -> bool:
        """Whether the rules are part of a group's rewards."""
        return rules_count(group.prompt.category, self._mixing.with_rules)

    def _score(self, value: float | None) -> Score:
        if value is not None:
            return Score(value, Outcome.GRADED)
        why = f"rendered to more than the {self._limit} tokens that the reward model can read"
        return Score(math.nan, Outcome.TOO_LONG, why)

    def _append_value(self, group: Group) -> None:
        """Where advantages see the values of all reward functions, the model's is the last of them:
        as it counts, before its weight. Those of rules that do not count are 0, as is the model's where
        it has no part."""
        if group.samples[0].score_values is None:
            return
        scores = [sample.scores.get(MODEL) for sample in group.samples]
        known = [None if score is None or score.outcome.failed else score.value for score in scores]
        share = float(self._with_rules(group))
        for sample, value in zip(group.samples, self._mixing.scaled(known), strict=True):
            assert sample.score_values is not None, "all samples have values or none"
            sample.score_values = np.append(share * sample.score_values, value)


class NoJudge:
    """In a world without a reward model."""

    def judged(self, batch: Batch, parts: Iterable[Drawn]) -> Iterable[Drawn]:
        return parts

    def take_tokens(self) -> int:
        return 0


AnyJudge = Judge | NoJudge


def _is_open(group: Group) -> bool:
    """Whether the model is to look at a group: not where rules alone count, nor a second time."""
    return group.prompt.category != BY_RULES and MODEL not in group.samples[0].scores


def _whole(group: Group) -> Group:
    """A group whose samples all travel with their tokens. One of a checkpoint may hold samples that
    did not train."""
    if group.trains and all(sample.trains for sample in group.samples):
        return group
    samples = [replace(sample, trains=True) for sample in group.samples]
    return replace(group, trains=True, samples=samples)


def _tokens(groups: Iterable[Group]) -> int:
    return sum(sample.length for group in groups for sample in group.samples)


def _check_finite(values: Mapping[int, Values]) -> None:
    """RuntimeError for a value that is no number: no reward can be made of it."""
    for position, of_group in values.items():
        wrong = [value for value in of_group if value is not None and not math.isfinite(value)]
        if wrong:
            raise RuntimeError(
                f"the reward model gave the value {wrong[0]} to a response to the prompt at position "
                f"{position} of the batch: its weights are damaged, or out of the range of bf16"
            )
