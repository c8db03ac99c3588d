r"""Units behind a number: which text is a unit, and which units measure the same thing.

A unit is read as a product of powers of known units (km/h, `\text{ square inches}`,
`\text{m/s}^2`), or as words that we do not know (apples), which are ignored. A count may stand
before it: million, dozen, tenths.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from r1zero.reward.math.normalize import DEGREE
from r1zero.reward.math.number_words import NUMBER_WORD, take_count
from r1zero.reward.math.values import REAL, Value

# For each quantity, names and sizes of its units, English and Chinese. Area and volume are powers
# of length.
_TABLE = {
    "length": "m meter metre=1; cm centimeter centimetre=1/100; mm millimeter millimetre=1/1000; "
    "dm=1/10; km kilometer kilometre=1000; in inch inches=127/5000; ft foot feet=381/1250; yd "
    "yard=1143/1250; mi mile=201168/125; \u7c73=1; \u5206\u7c73=1/10; \u5398\u7c73=1/100; "
    "\u6beb\u7c73=1/1000; \u5343\u7c73 \u516c\u91cc=1000",
    "length 2": "acre=316160658/78125; hectare ha \u516c\u9877=10000",
    "length 3": "l liter litre \u5347=1/1000; ml milliliter millilitre cc \u6beb\u5347=1/1000000",
    "mass": "kg kilo kilogram=1; g gm gram=1/1000; mg milligram=1/1000000; t ton tonne=1000; "
    "lb pound=45359237/100000000; oz ounce=45359237/1600000000; \u5343\u514b \u516c\u65a4=1; "
    "\u65a4=1/2; \u514b=1/1000; \u5428=1000",
    "time": "s sec second=1; min minute=60; h hr hour=3600; day=86400; week=604800; month=2629746; "
    "yr year=31556952; \u79d2=1; \u5206 \u5206\u949f=60; \u65f6 \u5c0f\u65f6=3600; \u5929=86400; "
    "\u5468 \u661f\u671f=604800",
    "dollar": "$ dollar usd=1; cent \u00a2=1/100",
    "yuan": "\u00a5 \u5143 yuan rmb=1; \u89d2=1/10",
    "euro": "\u20ac euro=1",
    "sterling": "\u00a3 gbp=1; pence=1/100",
    "yen": "yen jpy \u65e5\u5143=1",
    "ruble": "ruble rouble \u20bd=1",
    "peso": "peso=1",
    "franc": "franc chf=1",
    "rupee": "\u20b9 rs rupee=1",
    "angle": f"{DEGREE} deg degree \u5ea6=1",
    "radian": "rad radian \u5f27\u5ea6=1",
    "celsius": f"{DEGREE}c celsius \u6444\u6c0f\u5ea6=1",
    "fahrenheit": f"{DEGREE}f fahrenheit=1",
    "before noon": "am=1",
    "after noon": "pm=1",
}
_SPEEDS = {"mph": "mile/hour", "kmh": "km/h", "kph": "km/h"}
# name, in lower case and singular: quantity, power, size
_UNITS: dict[str, tuple[str, int, Fraction]] = {
    name: (
        quantity.partition(" ")[0] if power else quantity,
        int(power or 1),
        Fraction(row.split("=")[1]),
    )
    for quantity, rows in _TABLE.items()
    for power in [quantity[-1] if quantity[-1].isdigit() else ""]
    for row in rows.split(";")
    for name in row.split("=")[0].split()
}
_NO_UNITS = {
    "sqrt",
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "log",
    "exp",
    "mod",
    "pi",
    "infty",
    "base",
}
_SQUARES = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_SQUARED = {"squared": 2, "cubed": 3}
_CHINESE_POWERS = {"\u5e73\u65b9": 2, "\u7acb\u65b9": 3}

_OPERATORS = re.compile(  # words that make another number of the one before them
    r"\b(?:plus|minus|over|root|choose|factorial|through|divided|multiplied|modulo)\b|^(?:squared|cubed)\b"
    rf"|\b(?:times|point) {NUMBER_WORD}\b"
)
_NUMBER_WORD = re.compile(rf"{NUMBER_WORD}\b")
_ORDINAL = re.compile(r"\^? ?\{? ?(?:\\text ?\{)? ?(?:st|nd|rd|th)[ }]*")
_DEGREES = re.compile(rf"(?:{DEGREE}|degrees?) ?(?=celsius|fahrenheit|[cf]$)")
_NAMES = frozenset("eixyz")  # roman letters that are no unit
_LETTER = re.compile(r"[a-z](?P<power> ?\^ ?\{? ?-?[0-9] ?\}?)?")
_BLOCK = re.compile(r"\\text ?\{((?:[^{}]|\{[^{}]*\})*)\}")
_SHAPE = re.compile(
    rf"(?:[A-Za-z\u3400-\u9fff /*.%$'()\u2103{DEGREE}\u00a5\u20ac\u00a3-]|\^ ?(?:\{{ ?-?[0-9] ?\}}|-?[0-9]))*"
)
_HYPHEN = re.compile(r"[*.]|(?<=[a-z])-(?=[a-z])")
_WORD = re.compile(r"([^\^ ]+)(?: ?\^ ?\{? ?(-?[0-9]) ?\}?)?")


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit: "" for none, "%" for percent; what it measures, nothing where we do not know; its
    size."""

    name: str = ""
    measures: tuple[tuple[str, int], ...] = ()  # such as (("length", 1), ("time", -1))
    size: Fraction = Fraction(1)  # of all that is counted: 2 million dollars have two of 1000000
    count: Fraction = Fraction(1)  # how many of the unit that is


@lru_cache(maxsize=1024)
def read_unit(text: str, trusted: bool) -> Unit | None:
    r"""Read the text behind a number as a unit, or return None.

    What stands in `\text{}` is one. Bare letters must be a known unit or be words after a space;
    one letter glued to a right answer (`trusted`) is a variable.
    """
    if _ORDINAL.fullmatch(text):
        return Unit("th")
    bare = "\\text" not in text
    plain = _BLOCK.sub(r" \1 ", text)
    if not _SHAPE.fullmatch(plain):
        return None
    count, name = take_count(" ".join(plain.lower().split()))
    if plain.strip() and not plain.strip(" /*.'()-"):
        return None  # marks alone: 5/
    if _OPERATORS.search(name) or take_count(name)[0] != 1:
        return None  # this changes the number, or nobody counts like that
    if count != 1 and _NUMBER_WORD.match(name):
        return None  # thousand and one
    name = _DEGREES.sub("" if "celsius" in name or "fahrenheit" in name else DEGREE, name)
    if name[:1] == "(":
        name = name.strip(" ()")
    if name in ("%", "percent", "percentage", "pct", "per cent"):
        return Unit("%")
    if name.startswith("^") and bare:
        return None  # the power of the number
    if bare and _is_variable(name, glued=text[:1] != " ", trusted=trusted):
        return None
    if name in _NAMES:
        return None
    measures, size = _product(name)
    if bare and name.isascii() and name[:1].isalpha():
        glued = text[:1] not in (" ", "(")
        in_brackets = text.strip()[:1] == "(" and len(name) > 2
        if not (measures or in_brackets) and (glued or not _are_words(name)):
            return None
    return Unit(name, measures, size * count, count)


def _is_variable(name: str, glued: bool, trusted: bool) -> bool:
    """Tell whether a bare letter is no unit: the s of 3s^2, and the m of 5m if that is right."""
    letter = _LETTER.fullmatch(name)
    if letter is None:
        return False
    return (glued and trusted) or bool(letter["power"] and name[0] != "m")


def _are_words(text: str) -> bool:
    words = re.split(r"[ /.^-]+", text)
    words = [word for word in words if word not in ("", "of", "a", "in", "sq", "cu")]
    return all(len(word) > 2 and word not in _NO_UNITS for word in words)


def _product(name: str) -> tuple[tuple[tuple[str, int], ...], Fraction]:
    """Return what a product of units measures, and its size; ((), 1) when one of them is
    unknown."""
    powers: dict[str, int] = {}
    size = _ONE
    # a.m. is one word, sq. m. are two.
    name = re.sub(r"\b([ap])\. ?m\b\.?", r"\1m", name).replace("per ", "/ ").replace("\u6bcf", "/")
    for word, speed in _SPEEDS.items():
        name = re.sub(rf"\b{word}\b", speed, name)
    for place, side in enumerate(name.split("/")):
        direction = 1 if place == 0 else -1
        ahead = 1
        for word, power in _WORD.findall(_HYPHEN.sub(" ", side)):
            if word in _SQUARES:
                ahead = _SQUARES[word]
                continue
            chinese = _CHINESE_POWERS.get(word[:2])
            known = _lookup(word[2:] if chinese else word)
            if word in _SQUARED and powers:
                last = list(powers)[-1]
                powers[last] *= _SQUARED[word]
                continue
            if known is None:
                return (), _ONE
            quantity, dimension, worth = known
            exponent = int(power or 1) * ahead * (chinese or 1) * direction
            powers[quantity] = powers.get(quantity, 0) + dimension * exponent
            size *= worth**exponent
            ahead = 1
    return tuple(sorted(powers.items())), size


def _lookup(word: str) -> tuple[str, int, Fraction] | None:
    return _UNITS.get(word) or _UNITS.get(word.removesuffix("s"))


def scales(gold: Unit, given: Unit) -> list[tuple[Value, Value]]:
    """Return the pairs of factors with which two numbers with these units may be compared; [] if
    never.

    A unit that one side leaves out is taken from the other, but a percent or degree sign may also
    stand for its meaning: 50% is 50 or 0.5. Units that we know must measure the same; others are
    ignored, but not how many there are: 3 dozen are 36, and 3 only where the right answer is bare,
    since dozens may be asked for.
    """
    pairs = _uncounted(gold, given)
    if gold.count == given.count or (gold.measures and given.measures):
        return pairs
    counted = [(mine * gold.count, other * given.count) for mine, other in pairs]
    if gold == Unit():
        return pairs + counted
    return counted


def _uncounted(gold: Unit, given: Unit) -> list[tuple[Value, Value]]:
    """Return the pairs of factors with which one of each unit is compared."""
    if gold.measures and given.measures:
        kinds = {gold.measures, given.measures}
        if kinds == {_ANGLE, _RADIAN}:
            return [(_worth(gold), _worth(given))]
        if len(kinds) == 1 or kinds in ({_ANGLE, _CELSIUS}, {_ANGLE, _FAHRENHEIT}):
            return [(gold.size, given.size)]  # 20 degrees may be of any kind
        return []
    if gold.name == given.name:
        return [(_ONE, _ONE)]
    if gold.name and given.name:
        strange = (gold.name == "%" and given.measures) or (given.name == "%" and gold.measures)
        if strange:
            return []
        return [(_ONE, _ONE)]
    pairs: list[tuple[Value, Value]] = [(_ONE, _ONE)]
    if _worth(gold) != 1 or _worth(given) != 1:
        pairs.append((_worth(gold), _worth(given)))
    return pairs


_ONE = Fraction(1)
_ANGLE = (("angle", 1),)
_RADIAN = (("radian", 1),)
_CELSIUS = (("celsius", 1),)
_FAHRENHEIT = (("fahrenheit", 1),)


def _worth(unit: Unit) -> Value:
    """Return the number that a sign stands for: a hundredth, or the radians of a degree."""
    if unit.name == "%":
        return Fraction(1, 100)
    if unit.measures == _ANGLE:
        return REAL.pi / 180
    return _ONE
