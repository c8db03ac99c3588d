r"""Whether two answers are the same mathematics.

Both are read as one of the kinds of answers.py and compared as such: numbers and formulas by their values
(formulas.py, which states the tolerance), intervals and inequalities as sets of reals, lists by order or
without. What our reader does not know, such as integrals, determinants and congruences, is left to
math-verify, which asks sympy.

Units: one that only one side gives is ignored; two known ones are converted, and must measure the same.
Percent: 50% is 50 or 0.5, but a bare 50 is never 0.5.

Loads sympy; only the processes of the judge import this. Our own reading takes microseconds to a few
milliseconds, whatever the text; sympy may never end, and the process that runs it is killed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from r1zero.reward.algebra import same_algebra
from r1zero.reward.answers import readings
from r1zero.reward.choices import same_text
from r1zero.reward.compare import same_answer
from r1zero.reward.format import last_box
from r1zero.reward.kinds import Answer
from r1zero.reward.spelling import clean, is_balanced
from r1zero.reward.values import Unbounded, Undefined

MAX_CHARACTERS = 1000  # of an answer; the longest right answer of MATH has 159
_SPACES = re.compile(r"(?<![0-9]) | (?![0-9])")
_BEYOND_US = re.compile(  # commands that sympy may know
    r"\\(?:int|iint|oint|sum|prod|lim|limsup|liminf|det|begin|p?mod|bmod|max|min|sup|inf|gcd|lcm|cap|mathbb|"
    r"partial|lVert|sgn|nabla|choose|overline|Re|Im|arg)(?![A-Za-z])|\u2229"
)


@dataclass(frozen=True, slots=True)
class _Reading:
    """A text as cleaned, without its spaces, and what it may mean."""

    text: str
    key: str
    answers: list[Answer]


def _read(text: str, trusted: bool) -> _Reading:
    cleaned = clean(text)
    if len(cleaned) > 2 * MAX_CHARACTERS:
        return _Reading("", "", [])  # one character may stand for many
    return _Reading(cleaned, _SPACES.sub("", cleaned), readings(cleaned, trusted))


@lru_cache(maxsize=4096)
def _read_gold(text: str) -> _Reading:
    return _read(last_box(text) or text, trusted=True)


def same(gold: str, given: str) -> bool:
    """Tell whether a given answer is the right one. Both are LaTeX or plain text, with or without `$`."""
    if max(len(gold), len(given)) > MAX_CHARACTERS:
        return False
    right, answer = _read_gold(gold), _read(given, trusted=False)
    if not right.text or not answer.text:
        return False
    if right.key == answer.key:
        return True
    verdict = same_text(right.text, answer.text)
    if verdict is None:
        verdict = _same_reading(right, answer)
    return same_algebra(gold, given) if verdict is None else verdict


def _same_reading(right: _Reading, answer: _Reading) -> bool | None:
    """Compare all that the texts may mean; None when it needs algebra."""
    unread = [side.text for side in (right, answer) if not side.answers]
    if unread:
        hopeful = any(map(_BEYOND_US.search, unread)) and all(map(is_balanced, unread))
        return None if hopeful else False
    unknown = False
    for mine, other in product(right.answers, answer.answers):
        try:
            verdict = same_answer(mine, other)
        except (Unbounded, Undefined):
            continue
        if verdict:
            return True
        unknown |= verdict is None
    return None if unknown else False
