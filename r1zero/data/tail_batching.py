"""Tail batching: long answers are put off, and answered together.

A step ends with its longest answer, while most of the fleet has nothing left to decode. With tail
batching most steps are short: their responses stop at a length that most groups stay below, and a
group with a response that has not ended by then is put off, its tokens lost. When as many prompts
wait as a step has, they have a step of their own, with the full response budget: all its answers are
long, so all replicas are busy to its end (RollPacker, arXiv:2509.21009, section 4, which takes the
first to finish; here lengths alone decide).

What a step draws follows from the lengths of steps before, so it is known before generation and the
same on any layout. All samples are drawn by the weights of their step, and each prompt of an epoch is
answered, and learnt from, once. When it is answered its samples have the random numbers of its first
draw. Other numbers would often make a short answer of what was put off for being long, and short
answers would be learnt from more often than the policy gives them: with eight responses of which one in
twenty is long, three times as seldom from long ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass

import numpy as np

from r1zero.types import Batch

GROWTH = 1.25  # of a length that fewer groups stay below than should


@dataclass(frozen=True, slots=True)
class Late:
    """A prompt that was put off."""

    index: int
    step: int  # of its first draw
    position: int


@dataclass(frozen=True, slots=True)
class Draw:
    """The prompts of a step."""

    fresh: int  # from the stream of prompts
    put_off: tuple[Late, ...] = ()  # those that waited, in order
    limit: int | None = None  # tokens at which responses stop and groups are put off; None: budget

    @property
    def first_draws(self) -> tuple[tuple[int, int], ...]:
        """Step and position of those that waited."""
        return tuple((late.step, late.position) for late in self.put_off)


class TailBatching:
    """Which prompts wait, and where short steps stop. Kept by the controller and its checkpoints."""

    def __init__(self, share: float) -> None:
        """`share` of the groups shall end in a short step."""
        self._share = share
        self._limit: int | None = None
        self._waiting: list[Late] = []  # the first to be answered first

    @property
    def waiting(self) -> int:
        """Prompts that are put off."""
        return len(self._waiting)

    def draw(self, count: int, budget: int) -> Draw:
        """Say what a step of about `count` prompts draws; those that waited wait no more.

        A short one draws more prompts, so that about `count` groups end: 10 of 8 with share 0.8.
        """
        if len(self._waiting) >= count:
            mine = tuple(self._waiting[:count])
            del self._waiting[:count]
            return Draw(0, mine)
        if self._limit is None or self._limit >= budget:
            return Draw(count)
        return Draw(math.ceil(count / self._share), limit=self._limit)

    def record(self, batch: Batch, lengths: np.ndarray, put_off: np.ndarray) -> None:
        """Take what a step brought: the tokens of its responses, int [P, G], and which groups were
        put off, bool [P]."""
        for position in np.flatnonzero(put_off).tolist():
            self._waiting.append(Late(batch.prompts[position].index, batch.step, position))
        if batch.first_draws:
            return  # they say nothing about prompts in general
        longest = np.where(put_off, np.inf, lengths.max(axis=1))
        found = np.sort(longest)[math.ceil(self._share * len(longest)) - 1]
        if math.isfinite(found):
            self._limit = max(1, int(found))
        else:
            assert batch.response_limit is not None, "groups are put off in short steps only"
            self._limit = math.ceil(batch.response_limit * GROWTH)

    def state(self) -> dict[str, np.ndarray]:
        """All of it, as arrays for a checkpoint."""
        return {
            "index": np.array([late.index for late in self._waiting], np.int64),
            "step": np.array([late.step for late in self._waiting], np.int64),
            "position": np.array([late.position for late in self._waiting], np.int64),
            "limit": np.array([self._limit or 0], np.int64),
        }

    def restore(self, state: Mapping[str, np.ndarray], known: Set[int]) -> None:
        """Go on from `state`. What waits must be among the `known` indices: data may have changed."""
        columns = (state[name].tolist() for name in ("index", "step", "position"))
        found = [Late(*row) for row in zip(*columns, strict=True)]
        self._waiting = [late for late in found if late.index in known]
        self._limit = state["limit"].tolist()[0] or None
