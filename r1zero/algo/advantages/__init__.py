"""Advantage estimators: x.py holds the estimator x, its settings and what it declares.

An estimator is a baseline and a scale: a pure function of a `GroupTable` (algo/group_table.py) that
returns one number for each response, float64 [n, G]. Whitening over the update, where an estimator
has it, is declared and done elsewhere (algo/whitening.py):

    @advantage(equal_groups_are_zero=True)
    def group_mean(table: GroupTable) -> np.ndarray: ...

Its keyword-only arguments are its settings, `algorithm.advantage_settings`; their annotations
convert and bound them (config/keys.py). A function of one's own without the decorator takes the
rewards alone, float64 [n, G].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from r1zero.algo.group_table import GroupTable
from r1zero.algo.whitening import Whitening
from r1zero.config import legacy
from r1zero.config.parse import SourcedValue
from r1zero.config.registry import Table
from r1zero.config.settings import read_settings
from r1zero.errors import BadInput, Diagnostics

Need: TypeAlias = Literal["scores", "verdict"]
SETTINGS = "algorithm.advantage_settings"


@dataclass(frozen=True, slots=True)
class Advantage:
    """An estimator with all that it declares."""

    function: Callable[..., np.ndarray]
    # A group whose rewards and verdicts are all equal has advantages of exactly 0, whatever the
    # other groups are: it may be skipped.
    equal_groups_are_zero: bool
    compares_groups: bool  # the advantages of a group depend on the other groups of its update
    whitens: Whitening | None  # afterwards, over the update
    needs: tuple[Need, ...]  # beside rewards and lengths
    of_rewards: bool = False  # a plain function: it is called with the rewards, not with the table

    def __call__(self, table: GroupTable, **settings: Any) -> np.ndarray:
        """The advantages before whitening."""
        return self.function(table.rewards if self.of_rewards else table, **settings)

    @property
    def __name__(self) -> str:
        return self.function.__name__

    @property
    def needs_whole_update(self) -> bool:
        """True if all groups of an update must be there before the first is learnt from."""
        return self.compares_groups or self.whitens is not None

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings given, converted, and the defaults of the others. BadInput if they don't fit."""
        notes = Diagnostics()
        sourced = {name: SourcedValue(value, f"{SETTINGS}.{name}") for name, value in given.items()}
        found = read_settings(self.function, sourced, SETTINGS, notes)
        if notes.problems:
            raise BadInput(notes.problems[0])
        return found


def advantage(
    *,
    equal_groups_are_zero: bool = False,
    compares_groups: bool = False,
    whitens: Whitening | None = None,
    needs: tuple[Need, ...] = (),
) -> Callable[[Callable[..., np.ndarray]], Advantage]:
    """Make a function an estimator (decorator); see `Advantage`."""
    assert not (whitens and equal_groups_are_zero), "whitening moves all advantages"

    def declare(function: Callable[..., np.ndarray]) -> Advantage:
        return Advantage(function, equal_groups_are_zero, compares_groups, whitens, needs)

    return declare


def as_advantage(found: Advantage | Callable[..., np.ndarray]) -> Advantage:
    """A plain function of one's own is one of rewards alone, about which nothing is known."""
    if isinstance(found, Advantage):
        return found
    return Advantage(found, False, True, None, (), of_rewards=True)


ADVANTAGES: Table[Any] = Table(
    "algorithm.advantage",
    package=__name__,
    refused={"gae": ": it needs the values of a critic, which GRPO does not have"},
    aliases=legacy.ADVANTAGES,
)


def advantages_of(table: GroupTable, chosen: Advantage, settings: Mapping[str, Any]) -> np.ndarray:
    """The advantage of every response, float64 [n, G], before whitening.

    Of all responses, also of those that are not learnt from: to leave one out changes no other's.
    BadInput for groups of one, and when an own function does not return one finite number a response.
    """
    rewards = table.rewards
    if not len(rewards):
        return np.zeros(rewards.shape)
    size = rewards.shape[1]
    if size < 2:
        raise BadInput(
            f"a group needs at least 2 samples to be compared, found {size}; "
            "raise n_samples_per_prompt"
        )
    values = np.asarray(chosen(table, **settings), np.float64)
    if values.shape != rewards.shape:
        raise BadInput(
            f"algorithm.advantage returned the shape {values.shape} for rewards of the shape "
            f"{rewards.shape}; return one number a sample"
        )
    if not np.isfinite(values).all():
        raise BadInput(
            f"algorithm.advantage returned {values.tolist()} for the rewards "
            f"{rewards.tolist()}; return finite numbers"
        )
    return values


def try_out(
    chosen: Advantage, settings: Mapping[str, Any], group_size: int, score_weights: np.ndarray
) -> None:
    """Call an estimator with two groups that could be of this run. BadInput if it fails on them."""
    right = np.arange(2 * group_size).reshape(2, group_size) % 2 == 0
    table = GroupTable(
        rewards=right.astype(np.float64),
        counted=np.full(right.shape, 8),
        right=right,
        scores=np.repeat(right[..., None], len(score_weights), axis=2).astype(np.float64),
        score_weights=score_weights,
    )
    try:
        advantages_of(table, chosen, settings)
    except BadInput:
        raise
    except Exception as error:  # noqa: BLE001 - code of the user: anything may happen
        raise BadInput(
            f"algorithm.advantage: {chosen.__name__} fails on a trial with two groups: "
            f"{type(error).__name__}: {error}"
        ) from None
