"""How a text is read as one of the kinds of answers.

Readers take cleaned text (spelling.clean). What fits no kind is None; what fits two, such as 1,234, is read
as both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from r1zero.reward.expression import parse
from r1zero.reward.formulas import branches, names, same_formula
from r1zero.reward.kinds import Answer, Based, Group, Matrix, Relation, Scalar, Sets, Words
from r1zero.reward.number_words import to_digits
from r1zero.reward.spelling import (
    AND,
    ANGLE_CLOSE,
    ANGLE_OPEN,
    APPROX,
    CUP,
    DEGREE,
    EMPTY,
    GE,
    IN,
    INFINITY,
    LE,
    MINUS_SET,
    NE,
    OR,
    PI,
    REALS,
    ROW,
    SET_CLOSE,
    SET_OPEN,
    is_enclosed,
    split,
    unwrap,
)
from r1zero.reward.tokens import GREEK, Node, Unreadable
from r1zero.reward.units import read_unit
from r1zero.reward.values import Unbounded, Undefined

_GROUPED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")


def readings(text: str, trusted: bool) -> list[Answer]:
    """Return what a cleaned text may mean, the likeliest first; `trusted` for the right answer."""
    joined = _GROUPED.sub(lambda match: match[0].replace(",", ""), text)
    spellings = [joined] if joined == text else [joined, text]
    found = []
    for spelling in spellings:
        for side in _approximations(spelling):
            answer = _read(side, trusted)
            if answer is not None:
                found.append(answer)
    return found


def _approximations(text: str) -> list[str]:
    """Return both sides of `2\\pi \\approx 6.28`."""
    return [part for _, part in split(text, APPROX) if part] or [text]


def _read(text: str, trusted: bool) -> Answer | None:
    try:
        return _Reader(trusted).answer(text)
    except (Unreadable, Unbounded, Undefined):
        return None


_LEAD = re.compile(r"\\text ?\{[^{}0-9]*(?:\b(?:is|are|about|approximately)|[:=\u4e3a\u662f]) ?\} ?(?=.)")
_ABOUT = re.compile(
    r"(?:\\text ?\{ ?)?(?:about|approximately|approx\.?|roughly|\u5927?\u7ea6)(?: ?\})? ?", re.IGNORECASE
)
_LABEL = re.compile(
    r"(?:\\text ?\{[^{}]+\}|\\(?!text)(?P<command>[A-Za-z]+)|[A-Z]+|[A-Za-z](?:[a-z]{2,})?|[\u3400-\u9fff]+)"
    r"(?: ?\^ ?\{? ?-1 ?\}?)?(?: ?_ ?(?:[A-Za-z0-9]|\{[^{}]{1,20}\}))?'*(?: ?\([^()]{1,20}\))?"
)
_POINT_LABEL = re.compile(r"[A-Z]? ?\( ?[a-z](?: ?, ?[a-z])* ?\)")
_BASED = re.compile(r"(-?[0-9A-Z]*[0-9][0-9A-Z]*(?:\.[0-9A-Z]+)?)(?:_|\(?base)([0-9]{1,2}|[a-z]+)\)?")
_MATRIX = re.compile(
    r"[(\[]? ?\\begin ?\{(?P<kind>[pbB]?(?:small)?matrix|array)\} ?(?:\{[lcr| ]*\})?"
    r"(?P<body>.*)\\end ?\{(?P=kind)\} ?[)\]]?"
)
# Number and unit share no first letter, or a long row of points would be tried in every division.
_COMPOUND = re.compile(r"(?:[0-9][0-9.]* ?(?:\\text ?\{[^{}]*\}|[A-Za-z][A-Za-z.]*|[\u3400-\u9fff]+) ?){2,4}")
_WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^\W_](?:[^\W_]|[ '.:-])*")
_LONG_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:arc|a)?(?:sin|cos|tan)|sqrt|infi)[A-Za-z]{4}")
_BUILDER = re.compile(r"([a-z]) ?(?:\u2208 ?\u211d ?)?[|:] ?(.+)")
NOTHING = frozenset(
    ("no solution", "no solutions", "no real solution", "no real solutions", "none", "empty set")
)


class _Reader:
    """Reads texts of one side; raises Unreadable or returns None for what it does not know."""

    def __init__(self, trusted: bool) -> None:
        self._trusted = trusted

    def answer(self, text: str) -> Answer | None:
        """Read a text by what stands outside of its brackets, the loosest first."""
        text = _LEAD.sub("", unwrap(text.rstrip(" .,;").lstrip(" ,;")))
        parts = split(text, ",;" + AND + OR)
        if len(parts) > 1:
            return self._list(parts)
        if text in (EMPTY, SET_OPEN + SET_CLOSE, SET_OPEN + " " + SET_CLOSE):
            return Group("{}", ())
        if text == REALS:
            return _interval("(", Node("neg", (_ENDLESS,)), _ENDLESS, ")")
        for reader in (self._relation, self._sets, self._matrix, self._bracketed, self._based, self._ratio):
            found = reader(text)
            if found is not None:
                return found
        return self.scalar(text) or self._compound(text) or self._words(text)

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
        return None if isinstance(answer, Relation | Words) else answer

    def _sets(self, text: str) -> Answer | None:
        parts = split(text, CUP + MINUS_SET)
        if len(parts) < 2:
            return None
        joined = self._all(part for sign, part in parts if sign != MINUS_SET)
        removed = self._all(part for sign, part in parts if sign == MINUS_SET)
        return None if joined is None or removed is None else Sets(joined, removed)

    def _matrix(self, text: str) -> Answer | None:
        match = _MATRIX.fullmatch(text)
        if match is None:
            return None
        rows = [row for _, row in split(match["body"], ROW) if row]
        cells = [self._all(cell for _, cell in split(row, "&")) for row in rows]
        if None in cells or not cells:
            raise Unreadable("this matrix has a cell that cannot be read")
        return Matrix(tuple(cells))

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

    def scalar(self, text: str) -> Answer | None:
        """Read a formula with its unit; with a plus-minus it is a list of them."""
        text = to_digits(_ABOUT.sub("", text, count=1))
        found = self._money(text) or self._with_unit(text)
        if found is None:
            if _LONG_WORD.search(text):
                return None  # no product of letters
            try:
                found = Scalar(parse(text))
            except Unreadable:
                return None
        ways = branches(found.tree)
        if len(ways) == 1:
            return found
        return Group("", tuple(replace(found, tree=way, letters=None) for way in ways), AND)

    def _money(self, text: str) -> Scalar | None:
        match = _MONEY.fullmatch(text)
        if match is None:
            return None
        unit = read_unit(match["sign"], True)
        rest = self._with_unit(match["minus"] + match["rest"])
        return replace(rest, unit=unit) if rest else Scalar(parse(match["minus"] + match["rest"]), unit)

    def _with_unit(self, text: str) -> Scalar | None:
        match = _SUFFIX.search(text)
        unit = read_unit(match[0], self._trusted) if match and match.start() else None
        if match is None or unit is None:
            return None
        try:
            tree = parse(text[: match.start()])
        except Unreadable:
            return None
        if match["bare"] is None:
            return Scalar(tree, unit)
        if names(tree) or (tree.op == "add" and len(unit.name) == 1 and not _is_mixed(tree)):
            return None
        return Scalar(tree, unit, letters=_as_letters(text) if len(unit.name) == 1 else None)

    def _compound(self, text: str) -> Answer | None:
        """Read 2 hours 30 minutes as a list."""
        if not _COMPOUND.fullmatch(text):
            return None
        items = self._all(re.findall(r"[0-9.]+[^0-9]+", text))
        return items and Group("", items, AND)

    def _words(self, text: str) -> Answer | None:
        if len(text) < 2 or not _WORDS.fullmatch(text):
            return None
        words = plain_words(text)
        return Group("{}", ()) if words in NOTHING else Words(words)


_ENDLESS = Node("name", name="infinity")
_BRACKETS = {SET_OPEN + SET_CLOSE: "{}", ANGLE_OPEN + ANGLE_CLOSE: "()", "{}": ""}
_MONEY = re.compile(
    r"(?P<minus>-?) ?(?:US|\\text ?\{ ?US ?\})? ?(?P<sign>[$\u00a5\u20ac\u00a3]) ?(?P<rest>-?[^ ].*)"
)
_SUFFIX = re.compile(
    r"(?:(?<=[^ ]) ?(?:[/*]? ?\\text ?\{[^{}]*\}(?: ?\^ ?(?:\{ ?-?[0-9] ?\}|-?[0-9]))?)+"
    rf"|(?<=[0-9)}}\]!.{PI}{INFINITY}]) ?(?:"
    rf"(?:{DEGREE} ?(?:\\text ?\{{ ?)?[CF]?(?: ?\}})?)|%|[$\u00a5\u20ac\u00a3\u2103]"
    r"|[\u3400-\u9fff/]+(?:\^ ?\{[23]\})?"
    r"|\^ ?\{? ?\\text ?\{ ?(?:st|nd|rd|th) ?\} ?\}?|(?:st|nd|rd|th)"
    r"|(?P<bare>\(?[A-Za-z][A-Za-z./ '-]*(?: ?\^ ?(?:\{ ?[23] ?\}|[23]))?\)?)))$"
)


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


def _interval(left: str, low: Node, high: Node, right: str) -> Group:
    return Group(left + right, (Scalar(low), Scalar(high)))


def _is_label(text: str) -> bool:
    if _POINT_LABEL.fullmatch(text):
        return True
    match = _LABEL.fullmatch(text)
    return (
        match is not None
        and (match["command"] is None or match["command"] in GREEK)
        and text not in ("e", "i")
    )


def _is_mixed(tree: Node) -> bool:
    return len(tree.parts) == 2 and tree.parts[1].op == "div"


def _as_letters(text: str) -> Node | None:
    try:
        return parse(text)
    except Unreadable:
        return None
