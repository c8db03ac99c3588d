r"""Answers that need no algebra: numbers, numbers with units, lists of numbers, letters, words.

Most answers of a mathematics data set are of these kinds; they are read exactly, as fractions, in
microseconds. `same_plain` says True, False, or None for "not plain, ask the algebra".

Tolerance: where one side is written as a decimal, the two may differ by half a unit of the sixth decimal,
and by no more than a thousandth of the right answer. Otherwise equal means equal.
Units: one that only one side gives is ignored. Two known units are converted, and must be of one kind.
Percent: `50\%` is 50 percent or 0.5; a bare 50 and a bare 0.5 stay different.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from r1zero.reward.units import Unit, read_unit

_TRANSLATED = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width ASCII
    | {"\u2212": "-", "\u2013": "-", "\u3002": ".", "\u3001": ",", "\u00d7": r"\times ", "\u00f7": r"\div "}
    | {"\u00b7": r"\cdot ", "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u2264": r"\le ", "\u2265": r"\ge "}
    | {"\u2260": r"\ne ", "\u00b1": r"\pm ", "\u00b0": r"^\circ ", "\u00b2": "^{2}", "\u00b3": "^{3}"}
    | {"\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ", "\u2205": r"\emptyset "}
    | {"\u221a": r"\sqrt "}
    | {"\u00a0": " ", "\u3000": " ", "\ufeff": "", "\u00a5": "$", "\u20ac": "$", "\u00a3": "$"}
    | {chr(code): "" for code in (*range(0x200B, 0x2010), *range(0x202A, 0x202F))}  # marks without width
)
_REWRITES = [
    (re.compile(r"\\\$"), "\ue000"),  # a private mark while the signs that open math go
    (re.compile(r"\$|(?<!\\)\\[()!]|\\displaystyle|\\(?:left|right)(?![A-Za-z])\.?"), ""),
    (re.compile("\ue000"), "$"),
    (re.compile(r"(?<!\\)\\[,;: ]|~|\\quad|\\qquad|\s+"), " "),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\frac ?(\\[A-Za-z]+) ?([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:math|text)(?:rm|bf|it|sf|normal)\b|\\mbox\b"), r"\\text"),
    (re.compile(r"\^ ?(?:\\circ|\{ ?\\circ ?\})|\\degree|\\text ?\{ ?degrees? ?\}"), r"^\\circ"),
    (re.compile(r" +"), " "),
]
_WRAPPED = re.compile(r"\\text ?\{([^{}]*)\}\.?")


def clean(text: str) -> str:
    """Drop what carries no meaning: math signs, thin spaces, sizes, other spellings, the mark at the end."""
    text = text.translate(_TRANSLATED)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(".,; ")


def unwrap(text: str) -> str:
    r"""Take a text that is wholly one `\text{...}` out of it."""
    match = _WRAPPED.fullmatch(text)
    return match[1].strip() if match else text


# --- numbers --------------------------------------------------------------------------------------------

_LABEL = re.compile(r"(?:([A-Za-z]) ?= ?|\\approx ?|\u7ea6 ?)")
_INT = r"(?:[0-9]{1,3}(?:[, ][0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INT}(?:\.[0-9]*)?|\.[0-9]+)"
_PART = rf"(?:\{{ ?([+-]? ?{_DECIMAL}) ?\}}|([0-9]))"  # {12} or one digit, as TeX reads it
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?) ?(?P<money>\$?) ?(?P<minus>-?)"
    rf"(?:(?P<whole>[0-9]+)? ?\\frac ?{_PART} ?{_PART}"
    rf"|(?P<mixed>[0-9]+) (?P<above>[0-9]+) ?/ ?(?P<below>[0-9]+)"
    rf"|(?P<top>{_DECIMAL}) ?/ ?(?P<bottom>-?{_DECIMAL})"
    rf"|(?P<start>[0-9]*\.[0-9]*)\\(?:overline|dot) ?\{{ ?(?P<cycle>[0-9]+) ?\}}"
    rf"|(?P<decimal>{_DECIMAL})(?: ?\\times ?10 ?\^ ?(?:\{{ ?(?P<power>-?[0-9]{{1,3}}) ?\}}|(?P<digit>[0-9]))"
    rf"|[eE](?P<exponent>[+-]?[0-9]{{1,3}}))?)"
    rf"(?![0-9.])"
)


def _read(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", "").rstrip("."))


def _value(match: re.Match[str]) -> Fraction | None:
    """Return the number a match of `_NUMBER` spells, or None for a zero denominator."""
    part = match.groupdict()
    numerator, denominator = match[5] or match[6], match[7] or match[8]
    if numerator:
        top, bottom, whole = _read(numerator), _read(denominator), part["whole"]
    elif part["mixed"]:
        top, bottom, whole = _read(part["above"]), _read(part["below"]), part["mixed"]
    elif part["top"]:
        top, bottom, whole = _read(part["top"]), _read(part["bottom"]), None
    elif part["cycle"]:
        start, cycle = part["start"], part["cycle"]
        digits = len(start.partition(".")[2])
        top, bottom = Fraction(int(cycle), (10 ** len(cycle) - 1) * 10**digits), Fraction(1)
        whole = "0" + start.rstrip(".")
    else:
        power = int(part["power"] or part["digit"] or part["exponent"] or 0)
        top, bottom, whole = _read(part["decimal"]) * Fraction(10) ** power, Fraction(1), None
    if bottom == 0:
        return None
    value = top / bottom + (Fraction(whole) if whole else 0)
    return -value if (part["sign"] == "-") != (part["minus"] == "-") else value


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number as written: its exact value, whether it is a decimal, the unit behind it, the x of `x =`."""

    value: Fraction
    decimal: bool
    unit: Unit
    label: str


def read_quantity(text: str, trusted: bool) -> Quantity | None:
    """Read a whole cleaned text as a number with or without a unit; `trusted` for the right answer."""
    text = unwrap(text)
    label = _LABEL.match(text)
    start = label.end() if label else 0
    match = _NUMBER.match(text, start)
    unit = read_unit(text[match.end() :], trusted) if match else None
    value = _value(match) if match and unit else None
    if match is None or unit is None or value is None:
        return None
    if match["money"] and not unit.name:
        unit = Unit("$")
    decimal = ("." in match[0] and match["cycle"] is None) or match["exponent"] is not None
    return Quantity(value, decimal, unit, (label[1] or "") if label else "")


# --- comparison -----------------------------------------------------------------------------------------


def _close(gold: Fraction, given: Fraction, decimal: bool) -> bool:
    gap = abs(gold - given)
    return gap == 0 or (decimal and gap <= Fraction(5, 10**7) and gap <= abs(gold) / 1000)


def same_quantity(gold: Quantity, given: Quantity) -> bool:
    """Compare two numbers with their units."""
    if gold.label and given.label and gold.label != given.label:
        return False
    decimal = gold.decimal or given.decimal
    names = gold.unit.name, given.unit.name
    if names == ("%", ""):
        return _close(gold.value, given.value, decimal) or _close(gold.value / 100, given.value, decimal)
    if names == ("", "%"):
        return _close(gold.value, given.value, decimal) or _close(gold.value, given.value / 100, decimal)
    left, right = gold.unit.scale(), given.unit.scale()
    if left and right:
        return left[:2] == right[:2] and _close(gold.value * left[2], given.value * right[2], decimal)
    return _close(gold.value, given.value, decimal)


_LIST = re.compile(r"(\\\{|\(|\[|)(.*?)(\\\}|\)|\]|)")
_SEPARATOR = re.compile(
    r",(?: ?(?:\\text ?\{ ?)?(?:and|or)\b ?\}?)?|;| ?\\text ?\{ ?(?:and|or) ?\}| (?:and|or) "
    r"|[\u548c\u6216]"  # and, or
)


@dataclass(frozen=True, slots=True)
class Series:
    """At least two numbers, and their brackets: "()", "[)", "{}", or "" for none."""

    brackets: str
    items: list[Quantity]

    @property
    def unordered(self) -> bool:
        return self.brackets in ("", "{}")

    @property
    def named(self) -> bool:
        return all(item.label for item in self.items)


def read_series(text: str, trusted: bool) -> Series | None:
    """Read a whole cleaned text as numbers with something between them and around them."""
    match = _LIST.fullmatch(text)
    if not match or bool(match[1]) != bool(match[3]):
        return None
    parts = [read_quantity(part.strip(), trusted) for part in _SEPARATOR.split(match[2])]
    items = [part for part in parts if part is not None]
    if len(parts) < 2 or len(items) < len(parts):
        return None
    return Series((match[1] + match[3]).replace("\\", ""), items)


def same_series(gold: Series, given: Series) -> bool:
    """Compare points and intervals by order, sets without; a bare list may stand for either.

    Values with names go by name: `y=2,x=1` is the point (1, 2). A set is never a point or an interval.
    """
    kinds = {gold.brackets, given.brackets}
    left, right = gold.items, given.items
    if gold.unordered and given.unordered:
        key = _by_name if gold.named and given.named else _by_value
        left, right = sorted(left, key=key), sorted(right, key=key)
    elif len(kinds) > 1 and kinds != {"", "()"}:
        return False
    elif len(kinds) > 1:
        left, right = (sorted(it.items, key=_by_name) if it.named else it.items for it in (gold, given))
    return len(left) == len(right) and all(map(same_quantity, left, right))


def _by_name(item: Quantity) -> tuple[str, Fraction]:
    return item.label, item.value


def _by_value(item: Quantity) -> Fraction:
    return item.value


# --- letters and words ----------------------------------------------------------------------------------

_BASED = re.compile(r"([0-9A-F]+) ?_ ?\{? ?([0-9]+) ?\}?")
_LETTER = re.compile(r"\(?([A-Z])\)?")
_CHOICE = re.compile(r"\(?([A-Za-z])(?:\)?|[).:](.*))")
_HEDGE = re.compile(r"\b(?:or|and)\b|(?<![A-Za-z0-9])[A-Z][).:,]")  # a second choice
_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[ '.-])*")


def same_plain(gold: str, given: str) -> bool | None:
    """Compare two cleaned answers; None when they are not both plain."""
    number = read_quantity(gold, trusted=True), read_quantity(given, trusted=False)
    if number[0] and number[1] and same_quantity(number[0], number[1]):
        return True
    # After the numbers, since 1,234 may be one of them or a list of two.
    series = read_series(gold, trusted=True), read_series(given, trusted=False)
    if series[0] and series[1]:
        return same_series(series[0], series[1])
    if number[0] and number[1]:
        return False
    based = _BASED.fullmatch(gold), _BASED.fullmatch(given)
    if based[0] and based[1]:
        return based[0].groups() == based[1].groups()
    return _same_words(gold, given)


def _same_words(gold: str, given: str) -> bool | None:
    """Compare a choice letter or a text answer, without case; None when the right answer is neither."""
    bare, worded = unwrap(gold), unwrap(given)
    letter = _LETTER.fullmatch(bare)
    if letter:
        choice = _CHOICE.fullmatch(_WRAPPED.sub(r"\1", given).replace("{", "").replace("}", "").strip())
        if not choice:
            return None
        return choice[1].upper() == letter[1] and not _HEDGE.search(choice[2] or "")
    if not _WORDS.fullmatch(bare) or len(bare) < 2:
        return None
    if " ".join(bare.casefold().split()) == " ".join(worded.strip(" .").casefold().split()):
        return True
    return None if bare == gold and bare.isascii() else False
