"""How a text is read as one of the kinds of answers.

Readers take cleaned text (spelling.clean). What fits no kind is None; what fits two, such as 1,234, is read
as both.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from dataclasses import replace
from operator import itemgetter

from r1zero.reward.expression import parse
from r1zero.reward.formulas import branches, last_place, names, same_formula
from r1zero.reward.kinds import Answer, Based, Group, Matrix, Relation, Scalar, Sets, Words
from r1zero.reward.number_words import to_digits
from r1zero.reward.scalars import compound_parts, read_scalar
from r1zero.reward.spelling import AND, ANGLE_CLOSE, ANGLE_OPEN, APPROX, CUP, EMPTY, GE, IN, LE, MINUS_SET, NE
from r1zero.reward.spelling import OR, REALS, ROW, SET_CLOSE, SET_OPEN, is_enclosed, split, unwrap
from r1zero.reward.tokens import GREEK, Node, Unreadable
from r1zero.reward.values import Unbounded, Undefined, digits, evaluate

MAX_DEPTH = 20  # of lists in lists
_GROUPED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")


def readings(text: str, trusted: bool) -> list[Answer]:
    """Return what a cleaned text may mean, the likeliest first; `trusted` for the right answer."""
    joined = _GROUPED.sub(lambda match: match[0].replace(",", ""), text)
    spellings = [joined] if joined == text else [joined, text]
    found = []
    for spelling in spellings:
        sides = [_read(side, trusted) for _, side in split(spelling, APPROX) if side]
        if None not in sides and _are_near(sides):
            found.extend(sides)
    return found


def _are_near(sides: list[Answer]) -> bool:
    r"""Tell whether the sides of `2\pi \approx 6.28` are one number, rounded; `7 \approx 8` are two answers.

    Others differ from the first by a hundredth at most, and by less than the last place of one of the two.
    """
    if len(sides) < 2:
        return True
    if not all(isinstance(side, Scalar) and not names(side.tree) for side in sides):
        return False
    try:
        values = [digits(evaluate(side.tree)) for side in sides]
    except (Unbounded, Undefined):
        return False
    places = [digits(last_place(side.tree)) for side in sides]
    return all(
        value == values[0]
        or (abs(value - values[0]) <= abs(values[0]) / 100 and abs(value - values[0]) < max(place, places[0]))
        for value, place in zip(values, places, strict=True)
    )


def _read(text: str, trusted: bool) -> Answer | None:
    try:
        return _Reader(trusted).answer(text)
    except (Unreadable, Unbounded, Undefined):
        return None


_LEAD = re.compile(r"\\text ?\{[^{}0-9]*(?:\b(?:is|are|about|approximately)|[:=\u4e3a\u662f]) ?\} ?(?=.)")
_CHINESE_LEAD = re.compile(r"(?:\u7b54\u6848|\u7ed3\u679c)(?:\u662f|\u4e3a)?:? ?(?=.)")  # the answer is
_LABEL = re.compile(
    r"(?:\\text ?\{[^{}]+\}|\\frac ?\{ ?d ?[a-z]? ?\} ?\{ ?d ?[a-z] ?\}"
    r"|\\overline ?\{ ?[A-Z]+ ?\}|\|[A-Z]+\||m [A-Z]+"
    r"|\\(?!text|frac|over)(?P<command>[A-Za-z]+)|[A-Z]+|[A-Za-z](?:[a-z]{2,})?|[\u3400-\u9fff]+)"
    r"(?: ?\^ ?\{? ?-1 ?\}?)?(?: ?_ ?(?:[A-Za-z0-9]|\{[^{}]{1,20}\}))?'*(?: ?\([^()]{1,20}\))?"
)
_POINT_LABEL = re.compile(r"[A-Z]? ?\( ?[a-z](?: ?, ?[a-z])* ?\)")
_BASED = re.compile(r"(-?[0-9A-Z]*[0-9][0-9A-Z]*(?:\.[0-9A-Z]+)?)(?:_|\(?base)([0-9]{1,2}|[a-z]+)\)?")
_ENVIRONMENT = re.compile(
    rf"[(\[{SET_OPEN}]? ?\\begin ?\{{(?P<kind>[pbB]?(?:small)?matrix|array|cases|aligned|align\*?|gathered)"
    r"\} ?(?:\{[lcr| ]*\})?(?P<body>.*)\\end ?\{(?P=kind)\} ?[)\]]?"
)
_SYSTEMS = ("cases", "aligned", "align", "align*", "gathered")
_IF = re.compile(r"^(?:\\text ?\{ ?,? ?(?:if|for|when) ?\}|if|for|when) ?")
_WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^\W_](?:[^\W_]|[ '.:-])*")
_BUILDER = re.compile(r"([a-z]) ?(?:\u2208 ?\u211d ?)?[|:] ?(.+)")
NOTHING = frozenset(
    ("no solution", "no solutions", "no real solution", "no real solutions", "none", "empty set"))


class _Reader:
    """Reads texts of one side; raises Unreadable or returns None for what it does not know."""

    def __init__(self, trusted: bool) -> None:
        self._trusted, self._depth = trusted, 0

    def answer(self, text: str) -> Answer | None:
        """Read a text by what stands outside of its brackets, the loosest first."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable("it is too deep")
        found = self._answer(text)
        self._depth -= 1
        return found

    def _answer(self, text: str) -> Answer | None:
        text = _CHINESE_LEAD.sub("", _LEAD.sub("", unwrap(text.rstrip(" .,;").lstrip(" ,;"))))
        if "\\begin" in text:
            return self._environment(text)
        parts = split(text, ",;" + AND + OR + ROW)
        if len(parts) > 1:
            return self._list(parts)
        if text in (EMPTY, SET_OPEN + SET_CLOSE, SET_OPEN + " " + SET_CLOSE):
            return Group("{}", ())
        if text == REALS:
            return Group("()", (Scalar(Node("neg", (_ENDLESS,))), Scalar(_ENDLESS)))
        for reader in (self._relation, self._sets, self._bracketed, self._based, self._ratio):
            found = reader(text)
            if found is not None:
                return found
        return self._scalar(text) or self._words(text)

    def _all(self, texts: Iterable[str]) -> tuple[Answer, ...] | None:
        items = tuple(self.answer(text) for text in texts)
        return None if any(item is None for item in items) else items

    def _list(self, parts: list[tuple[str, str]]) -> Answer | None:
        """Read parts between commas, semicolons, and, or."""
        items = self._all(part for _, part in parts if part)
        joints = {sign for sign, _ in parts if sign}
        joint = OR if OR in joints else AND if AND in joints else ","
        if items and len(items) == 1:
            return items[0]
        return items and Group("", _flat(items), joint)

    def _relation(self, text: str) -> Answer | None:
        parts = split(text, "=<>" + LE + GE + NE + IN)
        if len(parts) < 2 or (text[:1] == SET_OPEN and is_enclosed(text)):
            return None
        signs, sides = [sign for sign, _ in parts[1:]], [side for _, side in parts]
        if set(signs) <= {"=", IN}:
            named = self._named(sides, signs)
            if named is not None:
                return named
        if IN in signs or not all(sides):
            raise Unreadable("this relation has no sides")
        return self._chain(sides, tuple(signs))

    def _chain(self, sides: list[str], signs: tuple[str, ...]) -> Answer:
        """Read formulas with signs between them; a chain of equal ones is worth its last."""
        trees = tuple(parse(side) for side in sides)
        if any(len(branches(tree)) > 1 for tree in trees):
            raise Unreadable("plus-minus in a relation")
        if set(signs) == {"="} and all(same_formula(trees[0], tree) for tree in trees[1:]):
            return Scalar(trees[-1])
        return Relation(trees, signs)

    def _named(self, sides: list[str], signs: list[str]) -> Answer | None:
        r"""Read what has a name, `x = 5`, `f(x) = x^2`, `5 = x`, `x \in [1,2]`, as what it is; else None."""
        if len(sides) == 2 and signs == ["="] and _is_label(sides[1]) and not _is_label(sides[0]):
            sides = sides[::-1]
        if not _is_label(sides[0]) or not sides[1]:
            return None
        if len(sides) > 2:
            answer = self._chain(sides[1:], tuple(signs[1:]))
        else:
            answer = self.answer(sides[1])
        label = "".join(sides[0].split())
        if isinstance(answer, Scalar):
            return None if label in names(answer.tree) else replace(answer, label=label)
        if isinstance(answer, Group) and answer.brackets == "":
            return replace(answer, items=tuple(_labelled(item, label) for item in answer.items))
        if isinstance(answer, Group) and _POINT_LABEL.fullmatch(sides[0]):
            return _by_neighbours(answer, re.findall("[a-z]", label))
        return None if isinstance(answer, Relation | Words) else answer

    def _sets(self, text: str) -> Answer | None:
        parts = split(text, CUP + MINUS_SET)
        if len(parts) < 2:
            return None
        joined = self._all(part for sign, part in parts if sign != MINUS_SET)
        removed = self._all(part for sign, part in parts if sign == MINUS_SET)
        return None if joined is None or removed is None else Sets(joined, removed)

    def _environment(self, text: str) -> Answer | None:
        """Read a matrix, or a system of equations, or the cases of a function."""
        match = _ENVIRONMENT.fullmatch(text)
        if match is None:
            return None
        rows = [[cell for _, cell in split(row, "&")] for _, row in split(match["body"], ROW) if row]
        if match["kind"] in _SYSTEMS:
            if match["kind"] == "cases" and any(len(row) > 1 for row in rows):
                items = tuple(self._all(_IF.sub("", cell) for cell in row) for row in rows)
                return None if None in items else Group("", tuple(Group("()", row) for row in items), AND)
            items = self._all("".join(row) for row in rows)
            return items and Group("", _flat(items), AND)
        cells = [self._all(row) for row in rows]
        return None if None in cells or not cells else Matrix(tuple(cells))

    def _bracketed(self, text: str) -> Answer | None:
        """Read a text that is in brackets from end to end."""
        if not is_enclosed(text) or len(text) < 3:
            return None
        brackets, inner = text[0] + text[-1], text[1:-1].strip()
        builder = _BUILDER.fullmatch(inner) if brackets == SET_OPEN + SET_CLOSE else None
        if builder:
            return self.answer(builder[2])
        parts = [part for _, part in split(inner, ",;")]
        brackets = _BRACKETS.get(brackets, brackets)
        if brackets == "{}" or len(parts) > 1:
            items = self._all(parts)
            if items is None or brackets not in ("()", "[]", "[)", "(]", "{}", ""):
                return None
            if len(items) != 2 and brackets == "[]":
                brackets = "()"  # a list, no interval
            return Group(brackets, _flat(items) if brackets == "{}" else items)
        return self.answer(inner) if brackets in ("()", "[]", "") else None

    def _based(self, text: str) -> Answer | None:
        bare = re.sub(r"\\text|[{} ]", "", text)
        match = _BASED.fullmatch(bare)
        if match is None:
            return None
        base = to_digits(match[2])
        return Based(match[1], int(base)) if base.isdigit() and int(base) > 1 else None

    def _ratio(self, text: str) -> Answer | None:
        parts = split(text, ":")
        if len(parts) < 2:
            return None
        items = self._all(part for _, part in parts)
        return items and Group(":", items)

    def _scalar(self, text: str) -> Answer | None:
        """Read a formula; with a plus-minus it is a list of them, and so is 2 hours 30 minutes."""
        found = read_scalar(text, self._trusted)
        if found is None:
            items = self._all(compound_parts(text))
            return Group("", items, AND) if items else None
        ways = branches(found.tree)
        if len(ways) == 1:
            return found
        return Group("", tuple(replace(found, tree=way, letters=None) for way in ways), AND)

    def _words(self, text: str) -> Answer | None:
        if len(text) < 2 or not _WORDS.fullmatch(text):
            return None
        words = plain_words(text)
        return Group("{}", ()) if words in NOTHING else Words(words)


_ENDLESS = Node("name", name="infinity")
_BRACKETS = {SET_OPEN + SET_CLOSE: "{}", ANGLE_OPEN + ANGLE_CLOSE: "()", "{}": ""}


def plain_words(text: str) -> str:
    """Return words without case, articles, and marks between them; synonyms in one form."""
    words = re.sub(r"[ .-]+", " ", text.casefold()).strip()
    words = re.sub(r"^(?:the|an|a) ", "", words)
    return "does not exist" if words == "dne" else words


def _flat(items: tuple[Answer, ...]) -> tuple[Answer, ...]:
    """Put the values of a plus-minus among the other items of a list."""
    flat: list[Answer] = []
    for item in items:
        flat.extend(item.items if isinstance(item, Group) and item.brackets == "" else [item])
    return tuple(flat)


def _labelled(answer: Answer, label: str) -> Answer:
    return replace(answer, label=label) if isinstance(answer, Scalar) else answer


def _by_neighbours(point: Group, letters: list[str]) -> Group:
    """Sort the coordinates of (y, x) = (1, 2) by their names, if these are neighbours in the alphabet."""
    row = "".join(sorted(letters))
    if row not in string.ascii_lowercase or len(letters) != len(point.items) or point.unordered:
        return point
    pairs = sorted(zip(letters, point.items, strict=True), key=itemgetter(0))
    return replace(point, items=tuple(item for _, item in pairs))


def _is_label(text: str) -> bool:
    if _POINT_LABEL.fullmatch(text):
        return True
    match = _LABEL.fullmatch(text)
    if match is None or text in ("e", "i"):
        return False
    return match["command"] is None or match["command"] in GREEK
