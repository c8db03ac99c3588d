"""The class of the user's mistakes, and how they are told: the key, its value, and the nearest
values that would work."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Factors = list[tuple[str, int]]  # names and values whose product must divide something


class BadInput(Exception):
    """A mistake of the user's, in configuration, data, model, checkpoint or environment: one
    sentence a line.

    It is told without a traceback, with exit code 2. Nothing else is: a ValueError of ours or of a
    library is a fault of the program, and keeps its traceback.
    """


class Diagnostics:
    """What is wrong, and what has no effect and why."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.ineffective: dict[str, list[str]] = {}  # places by reason
        self.remarks: list[str] = []

    def refuse(self, sentence: str) -> None:
        if sentence not in self.problems:  # a key that two roles share is converted twice
            self.problems.append(sentence)

    def ignore(self, where: str, reason: str) -> None:
        self.ineffective.setdefault(reason, []).append(where)

    def remark(self, sentence: str) -> None:
        """Something else that the user should know."""
        self.remarks.append(sentence)

    @property
    def warnings(self) -> list[str]:
        ineffective = [
            f"{', '.join(places)}: accepted, no effect: {reason}"
            for reason, places in self.ineffective.items()
        ]
        return ineffective + self.remarks


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Turn the system's refusal to look at a path, such as one in a closed folder, into a
    BadInput."""
    try:
        yield
    except OSError as error:
        if error.filename is None:  # os.getcwd names none
            raise BadInput(
                "the current directory is not there any more; change to another one"
            ) from None
        raise BadInput(
            f"{error.filename} cannot be looked at: {error.strerror}; name another path, or see "
            "to its permissions"
        ) from None


def nearest(word: str, known: Iterable[str], likeness: float = 0.5) -> str:
    """Say which known word the user may have meant; empty when none is near (`likeness` from 0 to
    1)."""
    found = difflib.get_close_matches(word, sorted(known), n=1, cutoff=likeness)
    if found:
        return f"; did you mean {found[0]}?"
    return ""


def multiple(key: str, value: int, factors: Factors) -> list[str]:
    """A sentence if the product does not divide the value."""
    product = math.prod(number for _, number in factors)
    if value % product == 0:
        return []
    below = value // product * product
    works = [number for number in (below, below + product) if number > 0]
    named = " x ".join(f"{name} {number}" for name, number in factors)
    return [f"{key}: {value} must be a multiple of {product} = {named}; {neighbours(value, works)}"]


def neighbours(value: int, works: Sequence[int]) -> str:
    """Name the nearest working values on both sides; there is at least one."""
    near = [
        max((number for number in works if number <= value), default=None),
        min((number for number in works if number >= value), default=None),
    ]
    found = sorted({number for number in near if number is not None})
    if len(found) == 1:
        verb = "would work"
    else:
        verb = "are the nearest that would work"
    return f"{' and '.join(map(str, found))} {verb}"


def shown(value: Any) -> str:
    """Write a value as YAML does."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "nothing"
    return str(value)
