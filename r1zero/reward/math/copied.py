r"""Whether an answer is a mere piece of the question, which a model soon finds worth trying.

Asked to evaluate $16(\frac{125}{2}+1)$, the box `16(\frac{125}{2}+1)` has the right value, and is
no answer. But a 5 or an option, which stand in the question as the right answer does, may be.
"""

from __future__ import annotations

import re
from functools import lru_cache

from r1zero.reward.math.answer_types import Answer, AnswerGroup, Matrix, Relation, Scalar, Sets
from r1zero.reward.math.labels import is_label
from r1zero.reward.math.multiple_choice import same_text
from r1zero.reward.math.normalize import clean, is_enclosed
from r1zero.reward.math.reading import read, read_right
from r1zero.reward.math.tokens import Node

_LOOKS = re.compile(r"\\text|[{}$]")  # what changes how a formula looks, and is set in many ways

Form = tuple[object, ...]


def is_copied_span(question: str, gold: str, given: str) -> bool:
    """Tell whether a right answer is a span of the question that is written otherwise than
    `gold`."""
    right = read_right(gold)
    answer = read(given, trusted=False)
    if right.key == answer.key or same_text(right.text, answer.text):
        return False
    forms = [_form(each) for each in right.answers]
    if any(_form(each) in forms for each in answer.answers):
        return False
    text = _plain(_bare(answer.text))
    spaced, squeezed = _read_question(question)
    return _squeezed(text) in squeezed and _span(text).search(spaced) is not None


@lru_cache(maxsize=256)
def _read_question(text: str) -> tuple[str, str]:
    """Return a question in the spelling of answers, with its spaces and without."""
    plain = _plain(clean(text))
    return plain, _squeezed(plain)


def _plain(text: str) -> str:
    return _LOOKS.sub("", text)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _bare(text: str) -> str:
    """Take an answer out of brackets around all of it, and from behind its name."""
    name, _, value = text.partition("=")
    if is_label(name.strip()):
        text = value.strip()
    while text[:1] in "({" and is_enclosed(text):
        text = text[1:-1].strip()
    return text


def _span(text: str) -> re.Pattern[str]:
    """Return a pattern that finds a text with any spaces in it, not within a number or a word."""
    characters = _squeezed(text)
    before = behind = ""
    if characters[:1].isdigit():
        before = r"(?<![0-9.])"
    elif characters[:1].isalpha():
        before = r"(?<![A-Za-z\\])"
    if characters[-1:].isdigit():
        behind = r"(?!\.?[0-9])"
    elif characters[-1:].isalpha():
        behind = "(?![A-Za-z])"
    return re.compile(before + " *".join(map(re.escape, characters)) + behind)


def _form(answer: Answer) -> Form:
    """Return how an answer is written, apart from brackets, units, names and the order of terms."""
    match answer:
        case Scalar():
            return _tree_form(answer.tree)
        case AnswerGroup():
            return _ordered([_form(item) for item in answer.items])
        case Matrix():
            return _ordered([_ordered([_form(cell) for cell in row]) for row in answer.rows])
        case Relation():
            return _ordered([_tree_form(side) for side in answer.sides])
        case Sets():
            return _ordered([_form(part) for part in answer.joined + answer.removed])
    return (answer,)


def _tree_form(tree: Node) -> Form:
    parts = [_tree_form(part) for part in tree.parts]
    if tree.op in ("add", "mul"):
        parts.sort(key=repr)
    return tree.op, tree.name, tree.value, *parts


def _ordered(forms: list[Form]) -> Form:
    if len(forms) == 1:
        return forms[0]
    return tuple(sorted(forms, key=repr))
