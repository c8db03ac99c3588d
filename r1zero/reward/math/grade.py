r"""The grader: whether two answers are the same mathematics, or one a mere piece of the question.

Both are read as one of the kinds of answers.py and compared as such: numbers and formulas by their
values (formulas.py, which states the tolerance), intervals and inequalities as sets of reals, lists
by order or without. What our reader does not know, such as integrals, determinants and congruences,
is left to math-verify, which asks sympy.

Units: one that only one side gives is ignored; two known ones are converted, and must measure the
same. Percent: 50% is 50 or 0.5, but a bare 50 is never 0.5.

Loads sympy; only the processes of the reward executor import this. Our own reading takes
microseconds to a few milliseconds, whatever the text; sympy may never end, and the process that
runs it is killed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from itertools import product

from r1zero.reward.math.algebra import same_algebra
from r1zero.reward.math.answer_types import Answer
from r1zero.reward.math.compare import same_answer
from r1zero.reward.math.conditions import is_domain
from r1zero.reward.math.copied import is_copied_span
from r1zero.reward.math.labels import is_label
from r1zero.reward.math.multiple_choice import same_text
from r1zero.reward.math.normalize import clean, is_balanced, split
from r1zero.reward.math.reading import MAX_CHARACTERS, Reading, read, read_right
from r1zero.reward.math.values import WORK, Unbounded, Undefined, more_digits
from r1zero.reward.math.words import is_denied

_BEYOND_US = re.compile(  # commands that sympy may know
    r"\\(?:int|iint|oint|sum|prod|lim|limsup|liminf|det|begin|p?mod|bmod|max|min|sup|inf|gcd|lcm|cap|mathbb|"
    r"partial|lVert|sgn|nabla|choose|overline|Re|Im|arg)(?![A-Za-z])|\u2229"
)
_OVERLOOKED = re.compile(  # by math-verify: a transpose; an ellipsis, a remainder, a condition
    r"(?:'|\^ ?\{? ?(?:T|\*|\\[a-z]+) ?\}?|\u00b0|\?) ?$|\\(?:ldots|p?mod|bmod)(?![A-Za-z])"
    r"|[,a-z] ?[A-Za-z] ?\u2208"
)

log = logging.getLogger("r1zero")


def same(gold: str, given: str) -> bool:
    """Tell whether a given answer is the right one. Both are LaTeX or plain text, with or without
    `$`.

    What cannot be compared for a fault of ours or of a library is not the same, and logged.
    """
    return _without_faults(_same, (gold, given), on_fault=False)


def is_copied(question: str, gold: str, given: str) -> bool:
    """Tell whether an answer, found right, stands in the question, and otherwise than the right
    one.

    Spaces and marks of LaTeX do not count, nor do brackets and a name around the answer. A fault
    counts as a copy, and is logged.
    """
    return _without_faults(is_copied_span, (question, gold, given), on_fault=True)


def _without_faults(compare: Callable[..., bool], texts: tuple[str, ...], on_fault: bool) -> bool:
    """Compare texts that a model wrote, and may be anything: one of them shall not stop a run."""
    try:
        return compare(*texts)
    except MemoryError:
        raise  # what is left of this process may be torn
    except Exception as error:  # noqa: BLE001
        # what sympy and we may raise on any text has no bound; told
        shown = ", ".join(f"{text[-80:]!r}" for text in texts)
        log.warning(
            "a comparison failed, which counts as wrong: %s: %s; of %s",
            type(error).__name__,
            error,
            shown,
        )
        return on_fault


def _same(gold: str, given: str) -> bool:
    if max(len(gold), len(given)) > MAX_CHARACTERS:
        return False
    right = read_right(gold)
    answer = read(given, trusted=False)
    if not right.text or not answer.text or not _agree(right.condition, answer.condition):
        return False
    if right.key == answer.key:
        return True
    verdict = same_text(right.text, answer.text)
    if verdict is None:
        verdict = _same_reading(right, answer)
    if verdict is None:
        return _same_algebra(right, answer)
    return verdict


def _agree(right: str, given: str) -> bool:
    """Tell whether answers with these conditions can be the same: the right one's may be left
    out."""
    return given in ("", right) or (not right and is_domain(given))


def _same_reading(right: Reading, answer: Reading) -> bool | None:
    """Compare all that the texts may mean; None when it needs algebra."""
    unread = [side.text for side in (right, answer) if not side.answers]
    if unread:
        hopeful = any(map(_BEYOND_US.search, unread)) and all(map(is_balanced, unread))
        if hopeful and not is_denied(answer.text):
            return None
        return False
    unknown = False
    for mine, other in product(right.answers, answer.answers):
        try:
            verdict = _same_to_the_last_digit(mine, other)
        except (Unbounded, Undefined):
            continue
        if verdict:
            return True
        unknown |= verdict is None
    if unknown:
        return None
    return False


def _same_to_the_last_digit(mine: Answer, other: Answer) -> bool | None:
    """Compare two answers, and again with many digits where a number may have swallowed another."""
    WORK.extreme = False
    verdict = same_answer(mine, other)
    if verdict and WORK.extreme:
        with more_digits():
            return same_answer(mine, other)
    return verdict


def _same_algebra(right: Reading, answer: Reading) -> bool:
    """Ask math-verify, side by side: of a chain of equations it would take the last."""
    if _OVERLOOKED.search(answer.text) and not _OVERLOOKED.search(right.text):
        return False
    golds = _sides(right.source)
    if len(golds) > 1:
        return same_algebra(right.source, answer.source)
    sides = _sides(answer.source)
    return bool(golds and sides) and all(same_algebra(golds[0], side) for side in sides)


def _sides(text: str) -> list[str]:
    """Return the sides of a chain of equations, less the name before them; [] when it is torn."""
    if "\\begin{cases}" in text or "\\begin{align" in text:
        return [text]
    sides = [side for _, side in split(text.replace("\\approx", "="), "=")]
    if len(sides) > 1 and is_label(clean(sides[0])):
        return sides[1:]
    return sides
