"""Policy losses (surrogate objectives): x.py holds the loss x, its settings and statistics.

A loss is a pure function of a `LossBatch` (algo/loss_batch.py). It returns the loss of each
response token, before aggregation, and a value for each token of every statistic it declares:

    @policy_loss(stats=(CLIPPED,))
    def grpo(batch: LossBatch, *, clip_low: float, clip_high: float) -> TokenLoss: ...

Its keyword arguments are its settings, `algorithm.loss_settings`. One named clip_low or clip_high
without a default is `actor_rollout.clip_ratio_low` or `clip_ratio_high`; where a loss reads neither,
to give them is told as a warning. The files here import torch for type checkers only: a
configuration is checked without it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from r1zero.algo.stats import OF_MODEL, Stat, all_stats
from r1zero.config.registry import Table
from r1zero.errors import BadInput, nearest

if TYPE_CHECKING:
    import torch

    from r1zero.algo.loss_batch import LossBatch

# Loss of each token [R], and the value of each declared statistic for each token [R], by its key.
TokenLoss: TypeAlias = "tuple[torch.Tensor, dict[str, torch.Tensor]]"
# What a loss compares with the weights that drew: each token, or a response; none: nothing is.
Ratio: TypeAlias = Literal["token", "sequence", "none"]
Limits = Mapping[str, tuple[float, float]]  # least and largest value of a setting


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """A loss with all that is declared about it."""

    function: Callable[..., TokenLoss]
    stats: tuple[Stat, ...]  # its own, beside those that every loss has
    aggregations: tuple[str, ...]  # that it may be used with, the default first; empty: any
    limits: Limits
    ratio: Ratio = "token"

    @property
    def __name__(self) -> str:
        return self.function.__name__

    @property
    def all_stats(self) -> tuple[Stat, ...]:
        """Its own statistics among those that every loss has."""
        return all_stats(self.stats)

    def __call__(self, batch: LossBatch, **settings: Any) -> TokenLoss:
        """Return the loss of each token. BadInput if its statistics are not those declared."""
        values, measured = self.function(batch, **settings)
        declared = {stat.key for stat in self.stats}
        if measured.keys() != declared:
            raise BadInput(
                f"the loss {self.__name__} declares the statistics {sorted(declared)} but returns "
                f"{sorted(measured)}; return one tensor [R] for each declared key"
            )
        return values, measured

    def settings(self, given: Mapping[str, Any], inherited: Mapping[str, float]) -> dict[str, Any]:
        """Complete the settings `given` by `inherited` ones and by defaults.

        BadInput for those that do not fit.
        """
        known = self._parameters()
        for name in given:
            if name not in known:
                choices = ", ".join(known) or "none"
                raise BadInput(
                    f"algorithm.loss_settings.{name} is no setting of the loss {self.__name__}"
                    f"{nearest(name, known)}; its settings are {choices}"
                )
        return {name: self._value(parameter, given, inherited) for name, parameter in known.items()}

    def inherits(self, name: str) -> bool:
        """True if this setting has no default: it comes from an older key of the configuration."""
        parameter = self._parameters().get(name)
        return parameter is not None and parameter.default is parameter.empty

    def _parameters(self) -> dict[str, inspect.Parameter]:
        found = inspect.signature(self.function).parameters
        return {
            name: found[name]
            for name in found
            if found[name].kind is inspect.Parameter.KEYWORD_ONLY
        }

    def _value(
        self, parameter: inspect.Parameter, given: Mapping[str, Any], inherited: Mapping[str, float]
    ) -> Any:
        """Return the value of one setting, of the type that its default has."""
        name = parameter.name
        if name not in given:
            value = parameter.default
            if value is parameter.empty:
                value = inherited.get(name)
            if value is None:
                raise BadInput(
                    f"algorithm.loss_settings.{name} is missing: the loss {self.__name__} needs it"
                )
            return value
        kind = float
        if parameter.default is not parameter.empty:
            kind = type(parameter.default)
        value = _converted(given[name], kind)
        low, high = self.limits.get(name, (value, value))
        if value is None or not low <= value <= high:
            raise BadInput(
                f"algorithm.loss_settings.{name}: {given[name]} must be {self._wanted(name, kind)}"
            )
        return value

    def _wanted(self, name: str, kind: type) -> str:
        if name not in self.limits:
            return {bool: "true or false", str: "a text"}.get(kind, "a number")
        low, high = self.limits[name]
        return f"a number from {low:g} to {high:g}"


def _converted(value: Any, kind: type) -> Any:
    """Convert without loss, or return None. `3e-4`, a text to YAML 1.1, is a number."""
    if kind in (bool, str):
        if isinstance(value, kind):
            return value
        return None
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if kind is int:
        if number.is_integer():
            return int(number)
        return None
    return number


def policy_loss(
    *,
    stats: tuple[Stat, ...] = (),
    aggregations: tuple[str, ...] = (),
    limits: Limits | None = None,
    ratio: Ratio = "token",
) -> Callable[[Callable[..., TokenLoss]], PolicyLoss]:
    """Make a function a policy loss (decorator): its statistics, the limits of its settings, and what
    its ratio is of."""

    def declare(function: Callable[..., TokenLoss]) -> PolicyLoss:
        return PolicyLoss(function, stats, aggregations, limits or {}, ratio)

    return declare


LOSSES: Table[PolicyLoss] = Table("algorithm.loss", package=__name__)


def stats_of(name: str) -> tuple[Stat, ...]:
    """Return all statistics of a run with this loss, for readers of its folder.

    Of an own loss only those that every loss has: to look at a folder runs no code of it.
    """
    of_loss = all_stats(())
    if name in LOSSES.names():
        of_loss = LOSSES[name].all_stats
    return (*of_loss, *OF_MODEL)
