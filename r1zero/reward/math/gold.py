r"""The right answer of a problem, as data sets write it: what is compared, and can be matched.

A response is compared with an answer such as 72, \frac{1}{2} or "no solution". Data sets also have
whole solutions that end in "#### 72" (GSM8K) or \boxed{72} (MATH), lists of one, and sentences.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass

from r1zero.reward.boxes import answer_part, last_box
from r1zero.reward.math.answers import readings
from r1zero.reward.math.normalize import clean

MARK = "####"
NO_ANSWERS = ("proof", "notfound")  # of NuminaMath, where there is nothing to compare with
MOST_CHARACTERS = 1000  # of a right answer; no response is compared with a longer one
EXAMPLES = 3
_GROUPED = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_QUOTED_LIST = re.compile(r"\[\s*(['\"]).*\1\s*,?\s*\]", re.DOTALL)
_HAN = "\u3400-\u9fff"
_WORD = re.compile(rf"\\[A-Za-z]+|[{_HAN}]{{2}}|[^\W\d_{_HAN}]{{2,}}")  # commands of LaTeX are none
_MISSING = ("nan", "null", "<na>")  # as programs write what is not there
_LEAD = 2  # words before a number that make a sentence: "He has 7 apples"
_FEW = 3  # words that a formula may well have: "7 if x is even"
_MANY = 6  # words of an answer in words


def read_gold(text: str) -> str:
    r"""Return the answer itself: what is behind ####, in <answer> or \boxed, or alone in a list.

    Anything else comes back as it is, without white space around it.
    """
    text = text.strip()
    only = the_one_of(_quoted_list(text))
    if only is not None:
        return read_gold(only)
    if MARK in text:
        behind = text.rpartition(MARK)[2].strip()
        if behind:
            text = behind.splitlines()[0].strip()
        if _GROUPED.fullmatch(text):
            return text.replace(",", "")
        return text
    inner = answer_part(text)
    return (last_box(inner) or inner).strip() or text


def the_one_of(texts: Sequence[str]) -> str | None:
    """Return the text of a list that holds one, once or several times; None for others."""
    different = dict.fromkeys(text.strip() for text in texts)
    if len(different) == 1:
        return next(iter(different))
    return None


def _quoted_list(text: str) -> list[str]:
    """Return the texts of a list written as text, such as "['22']"; [] when it is none."""
    if len(text) > MOST_CHARACTERS or not _QUOTED_LIST.fullmatch(text):
        return []
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    if all(isinstance(item, str) for item in value):
        return value
    return []


def fault_of(gold: str) -> str:
    """Return why a right answer does not look like one, as `read_gold` gave it; "" if it does."""
    if not gold.strip():
        return "empty"
    if len(gold) > MOST_CHARACTERS:
        return f"longer than {MOST_CHARACTERS} characters"
    if gold.casefold() in _MISSING:
        return "a missing value as text"
    if MARK in gold:
        return f"nothing behind {MARK}"
    if _quoted_list(gold):
        return "a list of several"
    if _is_sentence(gold):
        return "a sentence"
    is_known = bool(readings(clean(gold), trusted=True)) or "\\" in gold or gold.isalpha()
    if is_known:
        return ""
    return "no number, formula, choice or words that can be read"


def _is_sentence(text: str) -> bool:
    words = _words(text)
    number = re.search("[0-9]", text)
    if number is None or len(words) > _MANY:
        return len(words) > _MANY
    return len(words) >= _FEW and len(_words(text[: number.start()])) >= _LEAD


def _words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text) if not word.startswith("\\")]


@dataclass(frozen=True, slots=True)
class GoldSurvey:
    """How many of the right answers do not look like one; different examples with the reason."""

    total: int
    odd: int
    examples: list[str]


def survey_golds(golds: Sequence[str]) -> GoldSurvey:
    """Look at right answers, as `read_gold` gave them; each different one is read once."""
    faults = {gold: fault_of(gold) for gold in dict.fromkeys(golds)}
    examples = [f"{gold!r:.80} ({fault})" for gold, fault in faults.items() if fault]
    return GoldSurvey(len(golds), sum(bool(faults[gold]) for gold in golds), examples[:EXAMPLES])


def are_hopeless(golds: Sequence[str]) -> bool:
    """Whether there are right answers, and not one looks like an answer."""
    return bool(golds) and all(map(fault_of, golds))
