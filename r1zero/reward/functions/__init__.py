"""Reward functions: x.py holds the function x, its settings and what it declares.

A reward function is a pure function of a `RewardInput` (reward/types.py), which shows prompt,
response, right answer and the declared columns of the data row; or, with the scope "group", of all
responses to one prompt:

    @reward_function(scope="sample", columns=("level",))
    def hard(case: RewardInput, *, bonus: float = 0.5) -> float:
        return bonus * (case.row["level"] >= 4)

Its keyword-only arguments are its settings, `reward.settings.<name>` of the configuration; their
annotations convert and bound them (config/keys.py). A value is a finite number, or a `Score` when
it is a verdict. Only the worker processes of the reward executor call reward functions, since a
hostile answer can hang or kill one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, get_args

from r1zero.config.keys import Number, between
from r1zero.config.registry import Table
from r1zero.reward.types import Declaration, RewardInput, Scope
from r1zero.scores import Outcome, Score

# A setting that is worth so much: what lies far outside leaves no digits of the other scores.
Worth = Annotated[Number, between(-(10**6), 10**6, 1)]


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A reward function with all that it declares."""

    function: Callable[..., Any]
    declared: Declaration

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, *args: Any, **settings: Any) -> Any:
        """Call the function itself, as written."""
        return self.function(*args, **settings)

    def score(
        self, name: str, cases: Sequence[RewardInput], settings: Mapping[str, Any]
    ) -> list[Score]:
        """Score responses, in order. TypeError or ValueError when it gives no value for one."""
        if self.declared.scope == "group":
            values = self.function(cases, **settings)
        else:
            values = [self.function(case, **settings) for case in cases]
        if not isinstance(values, Iterable):
            raise TypeError(
                f"{name} returned a {type(values).__name__}, not a list of {len(cases)} numbers"
            )
        values = list(values)
        if len(values) != len(cases):
            raise ValueError(f"{name} returned {len(values)} values for {len(cases)} responses")
        return [_as_score(name, number, value) for number, value in enumerate(values)]


def _as_score(name: str, number: int, returned: Any) -> Score:
    """The score of response `number`: what the function returned, if that is one."""
    score = returned
    if not isinstance(returned, Score):
        score = Score(returned, Outcome.GRADED)
    if not isinstance(score.value, Real):
        raise TypeError(
            f"{name} returned {returned!r:.80} for response {number}, which is no number"
        )
    if not math.isfinite(score.value):
        raise ValueError(
            f"{name} returned {score.value} for response {number}; values must be finite"
        )
    return Score(float(score.value), score.outcome)


def reward_function(
    *,
    scope: Scope = "group",
    columns: tuple[str, ...] = (),
    needs_verdict: bool = False,
    needs_tokens: bool = False,
    gives_verdict: bool = False,
    failed: float | str = 0.0,
    shares: str = "",
) -> Callable[[Callable[..., Any]], RewardFunction]:
    """Make a function a reward function (decorator); see `Declaration`."""
    if scope not in get_args(Scope):
        raise ValueError(f"scope: {scope!r} is not one of {', '.join(get_args(Scope))}")
    if isinstance(columns, str):
        raise ValueError(f'columns: {columns!r} must be a tuple of names, such as ("{columns}",)')
    if gives_verdict and (scope == "group" or needs_verdict):
        raise ValueError("gives_verdict: a verdict on a sample does not wait for its group")
    declared = Declaration(
        scope=scope,
        columns=tuple(columns),
        needs_verdict=needs_verdict,
        needs_tokens=needs_tokens,
        gives_verdict=gives_verdict,
        failed=failed,
        shares=shares,
    )

    def declare(function: Callable[..., Any]) -> RewardFunction:
        if isinstance(failed, str) and failed not in inspect.signature(function).parameters:
            raise ValueError(f"failed: {failed!r} is no setting of {function.__name__}")
        return RewardFunction(function, declared)

    return declare


def as_reward_function(function: Any) -> RewardFunction:
    """A plain function of the user's own is one of a group."""
    if isinstance(function, RewardFunction):
        return function
    return RewardFunction(function, Declaration())


def checked(credit: float, *, right: float = 1.0, wrong: float = 0.0) -> Score:
    """The score of a check: right with a credit of 1; less is wrong, and worth less in proportion."""
    if credit >= 1:
        return Score(right, Outcome.RIGHT)
    return Score(wrong + credit * (right - wrong), Outcome.WRONG)


REWARD_FUNCTIONS: Table[RewardFunction] = Table(
    "algorithm.verifier_function", package=__name__, aliases={"step": "reasoning_steps"}
)
