"""Groups that were generated before: what a checkpoint held of a batch, in place of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from r1zero.rollout.interface import RolloutProgress
from r1zero.types import Group, Part


class GroupSource(Protocol):
    """Where the step takes groups from: a rollout engine, or what was stored of one."""

    def collect(self, part: Part) -> list[Group]:
        """See `RolloutEngine.collect`."""

    def progress(self) -> RolloutProgress:
        """See `RolloutEngine.progress`."""


class StoredGroups:
    """The groups of a replica, complete and scored."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups

    def collect(self, part: Part) -> list[Group]:
        """Those of the part, in the order in which they are stored."""
        placed = [group for group in self._groups if group.position in part.positions]
        return [group for group in placed if group.longest in part.lengths]

    def progress(self) -> RolloutProgress:
        """All that there is."""
        samples = [sample for group in self._groups for sample in group.samples]
        tokens = sum(len(sample.tokens) for sample in samples)
        return RolloutProgress(len(samples), len(samples), 0, tokens)
