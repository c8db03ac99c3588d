"""Parsing: how a text is read as one of the types of answers.

Readers take cleaned text (spelling.clean). What fits no kind is None; what fits two, such as 1,234,
is read as both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from r1zero.reward.math.answer_types import (
    Answer,
    AnswerGroup,
    Based,
    Matrix,
    Relation,
    Scalar,
    Sets,
    Words,
)
from r1zero.reward.math.expression import parse
from r1zero.reward.math.formulas import (
    branches,
    is_plain,
    is_worked,
    last_place,
    names,
    same_formula,
)
from r1zero.reward.math.labels import coordinates, is_label, name_of
from r1zero.reward.math.normalize import (
    AND,
    ANGLE_CLOSE,
    ANGLE_OPEN,
    APPROX,
    CUP,
    EMPTY,
    GE,
    IN,
    LE,
    MINUS_SET,
    NE,
    OR,
    REALS,
    ROW,
    SET_CLOSE,
    SET_OPEN,
    is_enclosed,
    split,
    unwrap,
)
from r1zero.reward.math.number_words import to_digits
from r1zero.reward.math.scalars import compound_parts, read_scalar
from r1zero.reward.math.tokens import Node, Unreadable
from r1zero.reward.math.values import Unbounded, Undefined, digits, evaluate
from r1zero.reward.math.words import NOTHING, is_denied, plain_words

MAX_DEPTH = 20  # of lists in lists
_GROUPED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")


def readings(text: str, trusted: bool) -> list[Answer]:
    """Return what a cleaned text may mean, the likeliest first; `trusted` for the right answer."""
    if not trusted and is_denied(text):
        words = _words(text)
        if words:
            return [words]
        return []
    joined = _GROUPED.sub(lambda match: match[0].replace(",", ""), text)
    if joined == text:
        spellings = [joined]
    else:
        spellings = [joined, text]
    found: list[Answer] = []
    for spelling in spellings:
        sides = _read_all([side for _, side in split(spelling, APPROX) if side], trusted)
        if sides is not None and _are_near(sides):
            found.extend(sides)
    return found


def _read_all(texts: list[str], trusted: bool) -> list[Answer] | None:
    """Read the sides of an approximation; None if one of them is unreadable."""
    found = []
    for text in texts:
        answer = _read(text, trusted)
        if answer is None:
            return None
        found.append(answer)
    return found


def _are_near(sides: list[Answer]) -> bool:
    r"""Tell whether the sides of `2\pi \approx 6.28` are one number, rounded; `7 \approx 8` are two
    answers.

    Others differ from the first by a hundredth at most, and by less than the last place of one of
    the two.
    """
    if len(sides) < 2:
        return True
    trees = [side.tree for side in sides if isinstance(side, Scalar) and not names(side.tree)]
    if len(trees) < len(sides):
        return False
    try:
        values = [digits(evaluate(tree)) for tree in trees]
    except (Unbounded, Undefined):
        return False
    places = [digits(last_place(tree)) for tree in trees]
    return all(
        value == values[0]
        or (
            abs(value - values[0]) <= abs(values[0]) / 100
            and abs(value - values[0]) < max(place, places[0])
        )
        for value, place in zip(values, places, strict=True)
    )


def _read(text: str, trusted: bool) -> Answer | None:
    try:
        return _Reader(trusted).answer(text)
    except (Unreadable, Unbounded, Undefined):
        return None


_LEAD = re.compile(
    r"\\text ?\{[^{}0-9]*(?:\b(?:is|are|about|approximately)|[:=\u4e3a\u662f]) ?\} ?(?=.)"
)
# the answer is
_CHINESE_LEAD = re.compile(r"(?:\u7b54\u6848|\u7ed3\u679c)(?:\u662f|\u4e3a)?:? ?(?=.)")
_BASED = re.compile(
    r"(-?[0-9A-Z]*[0-9][0-9A-Z]*(?:\.[0-9A-Z]+)?)(?:_|\(?base)([0-9]{1,2}|[a-z]+)\)?"
)
_ENVIRONMENT = re.compile(
    rf"[(\[{SET_OPEN}]? ?\\begin ?\{{(?P<kind>[pbB]?(?:small)?matrix|array|cases|aligned|align\*?|gathered)"
    r"\} ?(?:\{[lcr| ]*\})?(?P<body>.*)\\end ?\{(?P=kind)\} ?[)\]]?"
)
_SYSTEMS = ("cases", "aligned", "align", "align*", "gathered")
_IF = re.compile(r"^(?:\\text ?\{ ?,? ?(?:if|for|when) ?\}|if|for|when) ?")
_WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^\W_](?:[^\W_]|[ '.:-])*")
_BUILDER = re.compile(r"([a-z]) ?(?:\u2208 ?\u211d ?)?[|:] ?(.+)")
_CLOCK = re.compile(r"[0-9]{1,2} ?: ?[0-5][0-9](?![0-9])")


class _Reader:
    """Reads texts of one side; raises Unreadable or returns None for what it does not know."""

    def __init__(self, trusted: bool) -> None:
        self._trusted = trusted
        self._depth = 0

    def answer(self, text: str) -> Answer | None:
        """Read a text by what stands outside of its brackets, the loosest first."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable("it is too deep")
        found = self._answer(text)
        self._depth -= 1
        return found

    def _answer(self, text: str) -> Answer | None:
        text = unwrap(text.rstrip(" .,;").lstrip(" ,;"))
        if "\\text" in text:
            text = _LEAD.sub("", text)
        if not text.isascii():
            text = _CHINESE_LEAD.sub("", text)
        if "\\begin" in text:
            return self._environment(text)
        points = self._named_points(text)
        if points is not None:
            return points
        parts = split(text, ",;" + AND + OR + ROW)
        if len(parts) > 1:
            return self._list(parts)
        if text in (EMPTY, SET_OPEN + SET_CLOSE, SET_OPEN + " " + SET_CLOSE):
            return AnswerGroup("{}", ())
        if text == REALS:
            return AnswerGroup("()", (Scalar(Node("neg", (_ENDLESS,))), Scalar(_ENDLESS)))
        for reader in (self._relation, self._sets, self._bracketed, self._based, self._ratio):
            found = reader(text)
            if found is not None:
                return found
        return self._scalar(text) or _words(text)

    def _all(self, texts: Iterable[str]) -> tuple[Answer, ...] | None:
        items = []
        for text in texts:
            item = self.answer(text)
            if item is None:
                return None
            items.append(item)
        return tuple(items)

    def _list(self, parts: list[tuple[str, str]]) -> Answer | None:
        """Read parts between commas, semicolons, and, or."""
        items = self._all(part for _, part in parts if part)
        joints = {sign for sign, _ in parts if sign}
        if OR in joints:
            joint = OR
        elif AND in joints:
            joint = AND
        else:
            joint = ","
        if not items:
            return None
        if len(items) == 1:
            return items[0]
        return AnswerGroup("", _flat(items), joint)

    def _named_points(self, text: str) -> AnswerGroup | None:
        """Read p = 5, q = 2; p = 7, q = 2 as the points (5, 2) and (7, 2)."""
        if "=" not in text or not any(sign in text for sign in ";" + OR):
            return None
        rows = [row for _, row in split(text, ";" + OR) if row]
        if len(rows) < 2 or not all("," in row or AND in row for row in rows):
            return None
        read = [self.answer(row) for row in rows]
        points = [point for point in read if isinstance(point, AnswerGroup) and point.names]
        if len(points) < len(read):
            return None
        if len({frozenset(point.names) for point in points}) > 1:
            return None
        return AnswerGroup("", tuple(replace(point, brackets="()") for point in points), OR)

    def _relation(self, text: str) -> Answer | None:
        parts = split(text, "=<>" + LE + GE + NE + IN)
        if len(parts) < 2 or (text[:1] == SET_OPEN and is_enclosed(text)):
            return None
        signs = [sign for sign, _ in parts[1:]]
        sides = [side for _, side in parts]
        if set(signs) <= {"=", IN}:
            named = self._named(sides, signs)
            if named is not None:
                return named
        if IN in signs or not all(sides):
            raise Unreadable("this relation has no sides")
        return self._chain(sides, signs)

    def _chain(self, sides: list[str], signs: list[str]) -> Answer:
        """Read formulas with signs between them; a chain of equal ones is worth its last."""
        trees = tuple(parse(side) for side in sides)
        if any(len(branches(tree)) > 1 for tree in trees):
            raise Unreadable("plus-minus in a relation")
        if set(signs) == {"="} and all(same_formula(trees[0], tree) for tree in trees[1:]):
            return Scalar(trees[-1])
        return Relation(trees, tuple(signs))

    def _named(self, sides: list[str], signs: list[str]) -> Answer | None:
        r"""Read what has a name, `x = 5`, `f(x) = x^2`, `5 = x`, `x \in [1,2]`, as what it is; else
        None."""
        turned = signs == ["="] and not is_label(sides[0]) and is_label(sides[1])
        if turned:
            sides = sides[::-1]
        label = name_of(sides[0])
        if not label or not sides[1]:
            return None
        answer = self.answer(sides[1]) if len(sides) == 2 else self._chain(sides[1:], signs[1:])
        if isinstance(answer, Scalar):
            if turned and not is_worked(answer.tree):
                return None  # 2 + 3 = x
            if label in names(answer.tree) or (":" in label and names(answer.tree)):
                return None  # x = x + 1, a/b = c/d
            return replace(answer, label=label)
        if isinstance(answer, AnswerGroup):
            return _named_group(answer, label, coordinates(sides[0]))
        if isinstance(answer, Relation | Words):
            return None
        return answer

    def _sets(self, text: str) -> Answer | None:
        parts = split(text, CUP + MINUS_SET)
        if len(parts) < 2:
            return None
        joined = self._all(part for sign, part in parts if sign != MINUS_SET)
        removed = self._all(part for sign, part in parts if sign == MINUS_SET)
        if joined is None or removed is None:
            return None
        if any(isinstance(each, Scalar) for each in joined + removed):
            raise Unreadable("a number is no set")
        return Sets(joined, removed)

    def _environment(self, text: str) -> Answer | None:
        """Read a matrix, or a system of equations, or the cases of a function."""
        label, _, rest = text.partition("=")
        if is_label(label.strip()):
            return self.answer(rest)
        match = _ENVIRONMENT.fullmatch(text)
        if match is None:
            return None
        rows = []
        for _, row in split(match["body"], ROW):
            if row:
                rows.append([cell for _, cell in split(row, "&")])
        if match["kind"] in _SYSTEMS:
            if match["kind"] == "cases" and any(len(row) > 1 for row in rows):
                conditions = [[_IF.sub("", cell) for cell in row] for row in rows]
                cases = self._rows(conditions)
                if cases is None:
                    return None
                return AnswerGroup("", tuple(AnswerGroup("()", row) for row in cases), AND)
            items = self._all("".join(row) for row in rows)
            return AnswerGroup("", _flat(items), AND) if items else None
        cells = self._rows(rows)
        return Matrix(cells) if cells else None

    def _rows(self, rows: list[list[str]]) -> tuple[tuple[Answer, ...], ...] | None:
        """Read cells row by row; None if one of them is unreadable."""
        found = []
        for row in rows:
            cells = self._all(row)
            if cells is None:
                return None
            found.append(cells)
        return tuple(found)

    def _bracketed(self, text: str) -> Answer | None:
        """Read a text that is in brackets from end to end."""
        if not is_enclosed(text) or len(text) < 3:
            return None
        brackets = text[0] + text[-1]
        inner = text[1:-1].strip()
        if brackets == SET_OPEN + SET_CLOSE:
            builder = _BUILDER.fullmatch(inner)
        else:
            builder = None
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
            return AnswerGroup(brackets, _flat(items) if brackets == "{}" else items)
        if brackets in ("()", "[]", ""):
            return self.answer(inner)
        return None

    def _based(self, text: str) -> Answer | None:
        bare = re.sub(r"\\text|[{} ]", "", text)
        match = _BASED.fullmatch(bare)
        if match is None:
            return None
        base = to_digits(match[2])
        if base.isdigit() and int(base) > 1:
            return Based(match[1], int(base))
        return None

    def _ratio(self, text: str) -> Answer | None:
        parts = split(text, ":")
        if len(parts) < 2:
            return None
        items = self._all(part for _, part in parts)
        if not items:
            return None
        ratio = AnswerGroup(":", items, clock=_CLOCK.match(text) is not None)
        numbers = ratio.scalars
        if numbers is None or any(item.unit.name == "%" for item in numbers):
            return None
        if ratio.clock and not all(is_plain(item.tree) for item in numbers):
            raise Unreadable("this is no time")
        return ratio

    def _scalar(self, text: str) -> Answer | None:
        """Read a formula; with a plus-minus it is a list of them, and so is 2 hours 30 minutes."""
        found = read_scalar(text, self._trusted)
        if found is None:
            items = self._all(compound_parts(text))
            if items:
                return AnswerGroup("", items, AND)
            return None
        ways = branches(found.tree)
        if len(ways) == 1:
            return found
        return AnswerGroup("", tuple(replace(found, tree=way, letters=None) for way in ways), AND)


def _words(text: str) -> Answer | None:
    text = unwrap(text)
    if len(text) < 2 or not _WORDS.fullmatch(text):
        return None
    words = plain_words(text)
    if words in NOTHING:
        return AnswerGroup("{}", ())
    return Words(words)


_ENDLESS = Node("name", name="infinity")
_BRACKETS = {SET_OPEN + SET_CLOSE: "{}", ANGLE_OPEN + ANGLE_CLOSE: "()", "{}": ""}


def _flat(items: tuple[Answer, ...]) -> tuple[Answer, ...]:
    """Put the values of a plus-minus among the other items of a list."""
    flat: list[Answer] = []
    for item in items:
        flat.extend(item.items if isinstance(item, AnswerGroup) and item.brackets == "" else [item])
    return tuple(flat)


def _named_group(group: AnswerGroup, label: str, letters: list[str]) -> AnswerGroup:
    """Give the items of a list their name: x to both of x = 1, 2; p and q to (p, q) = (5, 2)."""
    if group.brackets == "":
        return replace(group, items=tuple(_labelled(item, label) for item in group.items))
    if group.brackets == ":":
        return replace(group, label=label)
    if len(letters) != len(group.items) or group.unordered:
        return group
    named = zip(group.items, letters, strict=True)
    return replace(group, items=tuple(_labelled(item, letter) for item, letter in named))


def _labelled(answer: Answer, label: str) -> Answer:
    if isinstance(answer, Scalar):
        return replace(answer, label=label)
    return answer
