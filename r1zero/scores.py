"""What reward functions say about responses. The processes that call them need no more of the records of a
step (r1zero/types.py), and none of the libraries of those."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

MODEL = "model"  # the name of the reward model among the reward functions


# What scores the responses to a problem where there is a reward model: `Prompt.category`, by the numbers
# of MindSpeed-LLM's `dataset_category`. A problem without one has both, or as the run says.
BY_RULES = 1  # the reward functions alone
BY_MODEL = 0  # the reward model alone; the functions still tell what is right


def rules_count(category: int | None, by_default: bool) -> bool:
    """Whether reward functions are part of a reward."""
    if category is None:
        return by_default
    return category == BY_RULES


class Outcome(IntEnum):
    """How the scoring of one sample by one reward function ended. Failures are never a silent zero."""

    RIGHT = 0
    WRONG = 1
    NO_ANSWER = 2
    TIMEOUT = 3
    CRASH = 4
    GRADED = 5  # a value without a verdict, such as that of a length
    COPIED = 6  # right by value, but a mere span of the question: counts as wrong
    TOO_LONG = 7  # for the reward model, whose positions end before the response does

    @property
    def failed(self) -> bool:
        """True when the function itself failed: the value says nothing about the response."""
        return self in (Outcome.TIMEOUT, Outcome.CRASH, Outcome.TOO_LONG)


@dataclass(frozen=True, slots=True)
class Score:
    """What one reward function said about one response: `value` before its weight, and how it came about."""

    value: float
    outcome: Outcome
    why: str = ""  # of a failure
