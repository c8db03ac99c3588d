"""Idle role objects: the actor and the reference of ranks that do not have these roles.

They take the same calls as those that work and do nothing, so that every rank runs the same step.
What they return is what such a rank has: no groups, no tokens, no update.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from r1zero.models.layout import WeightTarget
from r1zero.policy.actor import Actor
from r1zero.policy.handover import Delivery
from r1zero.policy.reference import LAYOUT, Reference
from r1zero.types import Batch, Group, UpdateStats


class IdleActor:
    """The actor of a rank that does not train."""

    advantages = np.zeros((0, 0))

    def begin(self, batch: Batch) -> None:
        pass

    def go_on(self, batch: Batch) -> None:
        pass

    def learn(self, delivery: Delivery) -> list[UpdateStats | None]:
        return []

    def learn_again(self, epoch: int) -> list[UpdateStats | None]:
        return []

    def finish(self, updates: list[UpdateStats | None], batch: Batch) -> None:
        pass

    def parameters(self) -> Mapping[str, torch.Tensor]:
        return {}

    def adapter_parameters(self) -> Mapping[str, torch.Tensor]:
        return {}


class IdleReference:
    """The reference of a rank outside the role, and of all ranks where there is none."""

    def add_logprobs(self, groups: list[Group]) -> list[Group]:
        return groups

    def weights(self) -> WeightTarget:
        return WeightTarget(LAYOUT, {}, lambda version: None)

    def take_tokens(self) -> int:
        return 0


# The types of what a rank has of a role.
AnyActor = Actor | IdleActor
AnyReference = Reference | IdleReference
