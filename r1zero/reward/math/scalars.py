r"""One number or formula with what people write around it: a unit, a currency, "about".

`$5`, `5\text{ cm}^2`, `3\sqrt{2}` feet, 50%, 90 degrees, five apples, `\approx 8.24 \text{ mph}`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from r1zero.reward.math.answer_types import Scalar
from r1zero.reward.math.expression import parse
from r1zero.reward.math.formulas import names
from r1zero.reward.math.normalize import AND, DEGREE, INFINITY, PI
from r1zero.reward.math.number_words import to_digits
from r1zero.reward.math.tokens import Node, Unreadable, is_whole
from r1zero.reward.math.units import read_unit

# a degree behind one belongs to it
_ANGLED = re.compile(r"(?:sin|cos|tan|cot|sec|csc|cis)(?![a-z]{2})")
_ABOUT = re.compile(
    r"(?:\\text ?\{ ?)?(?:about|approximately|approx\.?|roughly|\u5927?\u7ea6|\u4e00?\u5171\u6709?"
    r"|\u603b\u5171)(?: ?\})? ?",
    re.IGNORECASE,
)
_NEGATIVE = re.compile(
    r"(?:\\text ?\{ ?)?(?:negative|minus|\u8d1f)(?: ?\})? ?(?=[^ ])", re.IGNORECASE
)
_LONG_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:arc|a)?(?:sin|cos|tan)|sqrt|[Ii]nfi)[A-Za-z]{4}")
_MONEY = re.compile(
    r"(?P<minus>-?) ?(?:US|\\text ?\{ ?US ?\})? ?"
    r"(?P<sign>[$\u00a5\u20ac\u00a3\u20b9]|Rs\.?) ?(?P<rest>-?[^ ].*)"
)
_SUFFIX = re.compile(
    r"(?:(?<=[^ ]) ?(?:[/*]? ?\\text ?\{(?:[^{}]|\{[^{}]*\})*\}(?: ?\^ ?(?:\{ ?-?[0-9] ?\}|-?[0-9]))?)+"
    rf"|(?<=[0-9)}}\]!.{PI}{INFINITY}]) ?(?:"
    rf"(?:{DEGREE} ?(?:\\text ?\{{ ?)?[CF]?(?: ?\}})?)|%|[$\u00a5\u20ac\u00a3\u2103]"
    r"|\(?[\u3400-\u9fff/]+\)?(?:\^ ?(?:\{[23]\}|[23]))?"
    r"|\^ ?\{? ?\\text ?\{ ?(?:st|nd|rd|th) ?\} ?\}?|\^ ?\{ ?(?:st|nd|rd|th) ?\}|(?:st|nd|rd|th)"
    r"|(?P<bare>\(?[A-Za-z][A-Za-z./ '-]*(?: ?\^ ?(?:\{ ?[23] ?\}|[23]))?\)?)))$"
)
# Number and unit share no character, or a long row of points would be tried in every division.
_PART = r"[0-9]+(?:\.[0-9]+)? ?(?:\\text ?\{[^{}]*\}|[A-Za-z]+|[\u3400-\u9fff]+) ?"
_COMPOUND = re.compile(rf"(?:{_PART}){{2,4}}")


def read_scalar(text: str, trusted: bool) -> Scalar | None:
    """Read a whole cleaned text; None when it is no formula. `trusted` as in `read_unit`."""
    about = _ABOUT.match(text)
    if about:
        text = text[about.end() :]
    negative = _NEGATIVE.match(text)
    if negative:
        text = "-" + to_digits(text[negative.end() :])
    else:
        text = to_digits(text)
    money = _MONEY.fullmatch(text)
    if money:
        plain = money["minus"] + money["rest"]
        found = _with_unit(plain, trusted) or _bare(plain)
        unit = read_unit(money["sign"], trusted)
        if found is None or unit is None or found.unit.name == "%":
            return None
        count = found.unit.count
        return replace(found, unit=replace(unit, size=unit.size * count, count=count))
    return _with_unit(text, trusted) or (None if _LONG_WORD.search(text) else _bare(text))


def _bare(text: str) -> Scalar | None:
    tree = _tree(text)
    if tree is None:
        return None
    return Scalar(tree)


def _tree(text: str) -> Node | None:
    try:
        return parse(text)
    except Unreadable:
        return None


def _with_unit(text: str, trusted: bool) -> Scalar | None:
    """Read a formula with a unit behind it; None when there is none."""
    match = _SUFFIX.search(text)
    if match and match.start():
        unit = read_unit(match[0], trusted)
    else:
        unit = None
    if match is None or unit is None or (DEGREE in match[0] and _ANGLED.search(text)):
        return None
    tree = _tree(text[: match.start()])
    if unit.name == "th" and not _is_ordinal(tree, match[0]):
        return None
    if tree is None or match["bare"] is None:
        if tree is None:
            return None
        return Scalar(tree, unit)
    is_letter = len(unit.name.partition("^")[0].strip()) == 1  # m or m^2
    if names(tree) or (is_letter and tree.op == "add" and not _is_mixed(tree)):
        return None
    return Scalar(tree, unit, letters=_tree(text) if is_letter else None)


def _is_ordinal(tree: Node | None, suffix: str) -> bool:
    """Tell whether letters behind a number fit it: 1st and 2nd, but 3st is a product of three."""
    if tree is None or tree.value is None or not is_whole(tree):
        return False
    last = tree.value % 10
    teen = tree.value // 10 % 10 == 1
    if teen:
        fitting = "th"
    else:
        fitting = {1: "st", 2: "nd", 3: "rd"}.get(int(last), "th")
    return re.sub("[^a-z]|text", "", suffix) == fitting


def _is_mixed(tree: Node) -> bool:
    return len(tree.parts) == 2 and tree.parts[1].op == "div"


def compound_parts(text: str) -> list[str]:
    """Cut 2 hours 30 minutes into its parts; [] for any other text."""
    text = " ".join(text.replace(AND, "").split())
    if _COMPOUND.fullmatch(text):
        return re.findall(_PART, text)
    return []
