r"""Units behind a number: which text is a unit, and which units measure the same thing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

# For each kind of unit, sizes and the names that have them, English and Chinese.
_TABLE = {
    "length": "m meter metre=1; cm centimeter centimetre=1/100; mm millimeter millimetre=1/1000; dm=1/10; "
    "km kilometer kilometre=1000; in inch inche=127/5000; ft foot feet=381/1250; yd yard=1143/1250; "
    "mi mile=201168/125; \u7c73=1; \u5398\u7c73=1/100; \u6beb\u7c73=1/1000; \u5206\u7c73=1/10; "
    "\u5343\u7c73 \u516c\u91cc=1000",
    "mass": "kg kilogram=1; g gram=1/1000; mg milligram=1/1000000; t ton tonne=1000; "
    "lb pound=45359237/100000000; oz ounce=45359237/1600000000; "
    "\u5343\u514b \u516c\u65a4=1; \u514b=1/1000; \u5428=1000",
    "time": "s sec second=1; min minute=60; h hr hour=3600; day=86400; week=604800; month=2629746; "
    "yr year=31556952; \u79d2=1; \u5206\u949f=60; \u5c0f\u65f6=3600; \u5929=86400",
    "volume": "l liter litre=1; ml milliliter millilitre=1/1000; \u5347=1; \u6beb\u5347=1/1000",
    "money": "$ dollar \u5143=1; cent=1/100",
    "angle": "deg degree \u5ea6=1",
    "miles an hour": "mph mi/h=1",
    "metres an hour": "km/h kmh=1000; m/s=3600",
}
# Name, in lower case and singular, to kind and size.
_UNITS: dict[str, tuple[str, Fraction]] = {
    name: (kind, Fraction(row.split("=")[1]))
    for kind, rows in _TABLE.items()
    for row in rows.split(";")
    for name in row.split("=")[0].split()
}
_FUNCTIONS = {"sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "mod", "pi", "and", "infty"}

_UNIT = re.compile(
    r"(?:\\text ?\{ ?(?P<wrapped>[^{}0-9]*)\}"
    r"|(?P<bare>[A-Za-z/. ]+|(?:[\u3400-\u9fff\u2103]|/)+|\^\\circ(?: ?[CF])?|\\?%|\$)|)"
    r" ?(?:\^ ?\{? ?(?P<power>[23]) ?\}?)?"
)
_POWER_WORD = re.compile(r"(square|sq\.?|cubic|cu\.?|\u5e73\u65b9|\u7acb\u65b9) ?(.+)")


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit as written, such as cm and its power; "" for none, "%" for percent."""

    name: str = ""
    power: int = 1

    def scale(self) -> tuple[str, int, Fraction] | None:
        """Return (kind, power, size) of a known unit, None for others."""
        known = _lookup(self.name)
        return known and (known[0], self.power, known[1] ** self.power)


def _lookup(name: str) -> tuple[str, Fraction] | None:
    name = name.lower()
    return _UNITS.get(name) or _UNITS.get(name.removesuffix("s"))


def read_unit(text: str, trusted: bool) -> Unit | None:
    """Read the text behind a number as a unit, or return None.

    What stands in `text{}` is one. Bare letters must be a known unit or be words after a space; one letter
    glued to a right answer (`trusted`) is a variable.
    """
    match = _UNIT.fullmatch(text.strip())
    if match is None:
        return None
    bare = match["bare"]
    name = (bare if bare is not None else match["wrapped"] or "").strip(" .\\")
    if name.startswith("^"):
        return Unit("degree")
    if match["power"] and not name:
        return None  # the power of the number
    power = int(match["power"] or 1)
    word = _POWER_WORD.fullmatch(name)
    if word:
        name, power = word[2], 2 if word[1][0] in "s\u5e73" else 3
    if name.lower() in ("percent", "percentage", "pct", "%"):
        return Unit("%")
    if bare is not None and name.isascii() and name[:1].isalpha():
        glued = text[0] != " "
        if _lookup(name) is None and (glued or not _are_words(name)):
            return None
        if len(name) == 1 and glued and trusted:
            return None
    return Unit(name, power)


def _are_words(text: str) -> bool:
    words = text.replace("/", " ").lower().split()
    return all(len(word) > 2 and word not in _FUNCTIONS for word in words)
