r"""The words of a formula: numbers, names, commands, signs; and the tree that a formula becomes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from r1zero.reward.math.normalize import INFINITY, PI, SET_OPEN


class Unreadable(ValueError):
    """This is no formula that we know."""


@dataclass(frozen=True, slots=True)
class Node:
    """An operation and its operands. `value` belongs to numbers, `name` to variables and
    functions."""

    # number, name, add, mul, div, mod, neg, pow, root, call, factorial, binomial, plus-minus
    op: str
    parts: tuple[Node, ...] = ()
    value: Fraction | None = None
    name: str = ""
    decimal: bool = False  # a number written as a decimal, which may be rounded


TRIGONOMETRIC = {
    f"{arc}{name}{h}"
    for arc in ("", "arc")
    for name in "sin cos tan cot sec csc".split()
    for h in ("", "h")
}
FUNCTIONS = TRIGONOMETRIC | {"log", "ln", "exp", "cis", "abs"}
OF_LISTS = {"gcd", "lcm", "max", "min"}
_SHORT = {"GCD": "gcd", "LCM": "lcm", "asin": "arcsin", "acos": "arccos", "atan": "arctan"}
_SYMBOLS = {"pi": PI} | dict.fromkeys(("oo", "inf", "infty", "infinity"), INFINITY)
CONSTANTS = {PI: "pi", INFINITY: "infinity", "e": "e", "i": "i"}
GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar"
).split()

_TOKEN = re.compile(
    r"(?P<space> +)"
    r"|(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,3}(?: [0-9]{3})+(?![0-9])|[0-9]+)"
    r"(?:\.[0-9]*)?|\.[0-9]+)"
    r"(?:(?:\\(?:overline|dot|bar) ?\{ ?(?P<cycle>[0-9]+) ?\}|(?<=\.)\((?P<again>[0-9]+)\))"
    r"|[eE](?P<exponent>[+-]?[0-9]{1,3})(?![0-9A-Za-z]))?"
    r"|\\text ?\{ ?(?P<roman>[eixyz]) ?\}"
    r"|\\(?P<command>[A-Za-z]+)"
    r"|(?P<word>(?:a(?:rc)?)?(?:sin|cos|tan)h?|cot|sec|csc|sqrt|log|ln|exp|abs|pi"
    rf"|(?:gcd|lcm|GCD|LCM|max|min)(?= ?[({{\[{SET_OPEN}])|[Ii]nf(?:inity|ty)?|oo)"
    r"(?![A-Za-z]{2})"
    r"|(?P<letter>[A-Za-z\u0391-\u03c9])"
    r"|(?P<symbol>.)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str
    spaced: bool  # white space stands before it
    node: Node | None = None

    @property
    def number(self) -> Node:
        """What a number is worth."""
        assert self.node is not None, "only numbers have a worth"
        return self.node


def tokens(text: str) -> list[Token]:
    found = []
    spaced = False
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or ""
        if kind in ("cycle", "again", "exponent"):
            kind = "number"
        if kind == "space":
            spaced = True
            continue
        if kind == "number":
            found.append(Token(kind, match["number"], spaced, _number(match)))
        elif kind in ("word", "command"):
            word = _SHORT.get(match[kind], match[kind])
            if kind == "word":
                symbol = _SYMBOLS.get(word.lower(), "")
            else:
                symbol = ""
            found.append(
                Token("symbol", symbol, spaced) if symbol else Token("command", word, spaced)
            )
        else:
            found.append(Token(kind, match[kind], spaced))
        spaced = False
    return found


def _number(match: re.Match[str]) -> Node:
    digits = match["number"].replace(",", "").replace(" ", "")
    whole, point, behind = digits.partition(".")
    value = Fraction(int(whole or "0") * 10 ** len(behind) + int(behind or "0"), 10 ** len(behind))
    cycle = match["cycle"] or match["again"]
    if cycle and not point:
        raise Unreadable("a repeating part without a decimal point")
    if cycle:
        value += Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(behind))
    if match["exponent"]:
        value *= Fraction(10) ** int(match["exponent"])
    return Node("number", value=value, decimal=bool(behind or match["exponent"]) and not cycle)


def number(value: int | Fraction) -> Node:
    """Return an exact number as a tree."""
    return Node("number", value=Fraction(value))


def is_whole(node: Node | None) -> bool:
    return (
        node is not None
        and node.op == "number"
        and node.value is not None
        and node.value.denominator == 1
        and not node.decimal
    )
