"""The objective that a configuration chooses: policy loss, its settings, aggregation and advantage.

Checking a configuration makes one, too; for built-in functions that needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from r1zero.algo.advantages import ADVANTAGES, Advantage, as_advantage
from r1zero.algo.aggregation import AGGREGATIONS, DEFAULT, Aggregation, check_aggregation
from r1zero.algo.losses import LOSSES, PolicyLoss
from r1zero.errors import BadInput


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised, without the KL and entropy terms, and from which advantages."""

    loss: PolicyLoss
    settings: Mapping[str, Any]  # keyword arguments of the loss
    aggregation: Aggregation
    advantage: Advantage
    advantage_settings: Mapping[str, Any]  # keyword arguments of the advantage


def choose_objective(
    loss: str,
    settings: Mapping[str, Any],
    inherited: Mapping[str, float],
    aggregation: str | None,
    advantage: str,
    advantage_settings: Mapping[str, Any],
) -> Objective:
    """Look the names up. `inherited` are settings by older keys, for those without a default.

    BadInput for an unknown name, for settings that do not fit, and for an aggregation that makes
    another objective of this loss than its paper's.
    """
    chosen = LOSSES[loss]
    if not isinstance(chosen, PolicyLoss):
        raise BadInput(
            f"algorithm.loss: {loss} is no policy loss: "
            "put @policy_loss() of r1zero.algo.losses before it"
        )
    completed = chosen.settings(settings, inherited)
    allowed = chosen.aggregations
    if aggregation is None:
        if allowed:
            aggregation = allowed[0]
        else:
            aggregation = DEFAULT
    if allowed and aggregation not in allowed:
        names = ", ".join(allowed)
        raise BadInput(
            f"algorithm.aggregation: {aggregation} does not go with the loss {loss}; "
            f"set it to {names}"
        )
    estimator = as_advantage(ADVANTAGES[advantage])
    weighs = AGGREGATIONS[aggregation]
    check_aggregation(aggregation, weighs)
    return Objective(
        loss=chosen,
        settings=completed,
        aggregation=weighs,
        advantage=estimator,
        advantage_settings=estimator.settings(advantage_settings),
    )
