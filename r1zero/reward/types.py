"""What a reward function sees of a response, and what it declares about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Scope = Literal["sample", "group"]
# Settings of each reward function, by its name.
FunctionSettings = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class RewardInput:
    r"""One response to a problem.

    RewardInput("What is 1 + 1?", r"It is \boxed{2}.", "2", tokens=9, limit=512, truncated=False,
    right=True, row={"level": 1})
    """

    prompt: str  # as the model got it, with its template
    response: str  # without special tokens
    gold: str  # the right answer: 72 where the data has "#### 72"
    tokens: int  # of the response, its end-of-text token included
    limit: int  # most tokens that a response may have
    truncated: bool  # ended by the limit, not by the model
    # verdict of acc or base_acc; None before it, or when neither is listed
    right: bool | None = None
    # of the data: the columns that the reward functions of the run declare, as they stand there
    row: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""  # which data set the problem is from, if it has a name


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What a reward function declares; its settings are its keyword-only arguments.

    Plain values: the process that holds a function of the user's own tells them to the others.
    """

    # sample: called with one response as soon as it is finished; group: with all responses to a
    # prompt, once the last one is finished and those of a sample have scored them
    scope: Scope = "group"
    columns: tuple[str, ...] = ()  # of the data that it sees; dots reach into structs
    needs_verdict: bool = False  # a function that gives the verdict must be named, too
    needs_tokens: bool = False  # lengths count: a response without them cannot be scored
    gives_verdict: bool = False  # whether the response is right: `right` of the others
    # value of a response on which it fails, never more than the worst; or the setting that says it
    failed: float | str = 0.0
    shares: str = ""  # the reward function whose settings it takes, if not its own

    @property
    def after_verdicts(self) -> bool:
        """True if it is called for a whole group, when the verdicts on it are known."""
        return self.scope == "group" or self.needs_verdict
