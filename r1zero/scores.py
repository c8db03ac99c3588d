"""What reward functions say about responses. The processes that call them need no more of the records of a
step (r1zero/types.py), and none of the libraries of those."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Outcome(IntEnum):
    """How the scoring of one sample by one reward function ended. Failures are never a silent zero."""

    RIGHT = 0
    WRONG = 1
    NO_ANSWER = 2
    TIMEOUT = 3
    CRASH = 4
    GRADED = 5  # a value without a verdict, such as that of a length
    COPIED = 6  # right by value, but a mere span of the question: counts as wrong

    @property
    def failed(self) -> bool:
        """True when the function itself failed: the value says nothing about the response."""
        return self in (Outcome.TIMEOUT, Outcome.CRASH)


@dataclass(frozen=True, slots=True)
class Score:
    """What one reward function said about one response: `value` before its weight, and how it came about."""

    value: float
    outcome: Outcome
    why: str = ""  # of a failure
