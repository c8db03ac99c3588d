"""Reading: all that a text may mean, before anything is compared; a right answer is read once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from r1zero.reward.boxes import last_box
from r1zero.reward.math.answer_types import Answer
from r1zero.reward.math.answers import readings
from r1zero.reward.math.conditions import split_condition
from r1zero.reward.math.normalize import clean, undo_escapes

MAX_CHARACTERS = 1000  # of an answer; the longest right answer of MATH has 159
_SPACES = re.compile(r"(?<![0-9]) | (?![0-9])")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a text says: as it came, cleaned, and all that it may mean."""

    source: str  # with its escapes undone
    text: str  # cleaned, and without a condition behind it
    key: str  # the text without its spaces
    condition: str
    answers: list[Answer]


@lru_cache(maxsize=64)
def read(source: str, trusted: bool) -> Reading:
    """Read an answer; `trusted` for the right one."""
    source = undo_escapes(source)
    cleaned = clean(source)
    if len(cleaned) > 2 * MAX_CHARACTERS:
        return Reading("", "", "", "", [])  # one character may stand for many
    text, condition = split_condition(cleaned)
    return Reading(source, text, _SPACES.sub("", text), condition, readings(text, trusted))


@lru_cache(maxsize=4096)
def read_right(text: str) -> Reading:
    """Read a right answer, which may stand in a box."""
    return read(last_box(text) or text, trusted=True)
