"""Group selection (filtering): which groups train, decided between reward and reference.

A group that does not train keeps its place in the batch: it travels, is counted in the metrics of
rewards and is written with the samples. Neither the reference nor the policy looks at its tokens.
"""

from __future__ import annotations

from typing import Protocol

from r1zero.types import Group


class GroupSelector(Protocol):
    """Decides on the rollout ranks, each for the groups that its replica drew."""

    def select(self, groups: list[Group]) -> list[Group]:
        """Set `trains` of each group, whose rewards are known, and return all of them.

        The decision about a group may depend on that group only: other replicas hold the others.
        """


class AllGroups:
    """Every group trains."""

    def select(self, groups: list[Group]) -> list[Group]:
        return groups
