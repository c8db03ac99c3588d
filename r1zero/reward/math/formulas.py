"""Whether two formulas are worth the same.

Equal means: the same fraction, or the same first 40 digits; formulas with names in them are
compared at points. Where a side contains a decimal, which may have been rounded, the two may differ
by half a unit of the sixth decimal, and of the sixth significant digit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import count as count_from
from itertools import product

from r1zero.reward.math.normalize import MP
from r1zero.reward.math.tokens import Node, is_whole
from r1zero.reward.math.values import (
    CONSTANTS,
    POINTS,
    REAL,
    WORK,
    Unbounded,
    Undefined,
    Value,
    digits,
    evaluate,
    is_exact,
)

MAX_DENOMINATOR = 10**60  # of a decimal that may be rounded; values have that many digits
_SIXTH = REAL.mpf(5) / 10**7
_CLEARLY = REAL.mpf(10) ** -3


def branches(node: Node) -> list[Node]:
    r"""Return the trees that a tree with plus-minus signs stands for, at most eight.

    With a `\mp` in it, the signs go together; else each goes its own way.
    """
    signs = list(_signs(node))
    if not signs:
        return [node]
    if MP in signs:
        upper = ["-" if sign == MP else "+" for sign in signs]
        lower = ["+" if sign == MP else "-" for sign in signs]
        return [_choose(node, iter(upper)), _choose(node, iter(lower))]
    if len(signs) > 3:
        raise Unbounded("these are too many signs")
    return [_choose(node, iter(choice)) for choice in product("+-", repeat=len(signs))]


def _signs(node: Node) -> Iterator[str]:
    if node.op == "plus-minus":
        yield node.name
    for part in node.parts:
        yield from _signs(part)


def _choose(node: Node, signs: Iterator[str]) -> Node:
    if node.op != "plus-minus":
        if node.parts:
            return replace(node, parts=tuple(_choose(part, signs) for part in node.parts))
        return node
    sign = next(signs)
    inner = _choose(node.parts[0], signs)
    if sign == "+":
        return inner
    return Node("neg", (inner,))


def names(node: Node) -> set[str]:
    """Return the names of the variables in a tree."""
    if node.op == "name":
        if node.name in CONSTANTS:
            return set()
        return {node.name}
    return set().union(*map(names, node.parts))


def is_plain(node: Node) -> bool:
    """Tell whether a tree is a number as people write one: 5, -0.5, 2/3, 1 1/2."""
    if node.op in ("neg", "div"):
        return all(map(is_plain, node.parts))
    if node.op == "add":
        return len(node.parts) == 2 and is_whole(node.parts[0]) and node.parts[1].op == "div"
    return node.op == "number"


def is_worked(node: Node) -> bool:
    """Tell whether nothing is left to work out: not of 2 + 3, but of 5, 2 sqrt(3) and x + 1."""
    if is_plain(node) or names(node):
        return True
    value = evaluate(node)
    if isinstance(value, REAL.mpc):
        return True
    return not is_exact(value) and abs(value - REAL.nint(value)) > WORK.nothing


def is_rounded(node: Node) -> bool:
    """Tell whether a tree has a number in it that was written as a decimal."""
    return node.decimal or any(map(is_rounded, node.parts))


def last_place(node: Node) -> Fraction:
    """Return the worth of the last digit of a number, 1 or 1/10 or less; 0 for what is not
    rounded."""
    while node.op == "neg":
        node = node.parts[0]
    if not node.decimal or node.value is None or node.value.denominator > MAX_DENOMINATOR:
        return Fraction(is_whole(node))
    denominator = node.value.denominator
    places = next(count for count in count_from(0) if 10**count % denominator == 0)
    return Fraction(1, 10**places)


def close(gold: Value, given: Value, rounded: bool) -> bool:
    """Compare two values; `rounded` when one of them is written as a decimal."""
    exact = is_exact(gold, given)
    if exact and (gold == given or not rounded):
        return gold == given
    gold = digits(gold)
    given = digits(given)
    if REAL.isinf(gold) or REAL.isinf(given):
        return gold == given
    gap = abs(gold - given)
    if not exact and gap <= WORK.same * max(abs(gold), abs(given)):
        return True
    if not exact and not (gold and given) and gap < WORK.nothing:
        return True
    if not rounded or gap > _SIXTH or not gold:
        return False
    return gap <= 10 * _SIXTH * REAL.mpf(10) ** REAL.floor(REAL.log10(abs(gold)))


def same_formula(gold: Node, given: Node) -> bool:
    """Compare two trees without plus-minus; raise Unbounded or Undefined for a constant that is so.

    With names in them, they are the same when they agree at all points where both are real; where
    there is no such point, when they agree at all points.
    """
    if gold == given:
        return True
    rounded = is_rounded(gold) or is_rounded(given)
    if not names(gold) | names(given):
        return close(evaluate(gold), evaluate(given), rounded)
    real_points = 0
    others = []
    for point in range(POINTS):
        try:
            left = evaluate(gold, point)
            right = evaluate(given, point)
        except (Undefined, Unbounded):
            continue
        if not isinstance(left, REAL.mpc) and not isinstance(right, REAL.mpc):
            if not close(left, right, rounded):
                return False
            real_points += 1
        else:
            others.append((left, right))
    return real_points > 0 or (bool(others) and all(close(*pair, rounded) for pair in others))


def constant_ratio(gold: Node, given: Node) -> Value | None:
    """Return the number, not zero, that times the second tree is the first; None where there is
    none."""
    ratios = []
    for point in range(POINTS):
        try:
            left = digits(evaluate(gold, point))
            right = digits(evaluate(given, point))
        except (Undefined, Unbounded):
            continue
        if min(abs(left), abs(right)) < WORK.nothing or REAL.isinf(left) or REAL.isinf(right):
            return None
        ratios.append(left / right)
    rounded = is_rounded(gold) or is_rounded(given)
    if len(ratios) < 2 or not all(close(ratios[0], ratio, rounded) for ratio in ratios):
        return None
    return ratios[0]


def quadratic(tree: Node, name: str, point: int = 0) -> tuple[Value, Value, Value] | None:
    """Return (a, b, c) of a tree that is a x^2 + b x + c in a name x, or None; zeros are exact.

    Other names have the values of the point. Raises Unbounded or Undefined like `evaluate`.
    """
    at_0, at_1, before, at_3 = (
        digits(evaluate(_put(tree, name, value), point)) for value in (0, 1, -1, 3)
    )
    square = (at_1 + before) / 2 - at_0
    slope = (at_1 - before) / 2
    size = max(map(abs, (at_0, at_1, before, at_3)))
    if abs(at_3 - (9 * square + 3 * slope + at_0)) > WORK.same * size:
        return None
    clean = [0 if abs(value) <= WORK.same * size else value for value in (square, slope, at_0)]
    return clean[0], clean[1], clean[2]


def _put(tree: Node, name: str, value: Value) -> Node:
    """Return a tree with a value in the place of a name."""
    if tree.op == "name" and tree.name == name:
        return Node("number", value=Fraction(value) if isinstance(value, int) else value)
    if tree.parts:
        return replace(tree, parts=tuple(_put(part, name, value) for part in tree.parts))
    return tree


def differ_on_roots(gold: Node, given: Node) -> bool:
    """Tell whether a root of the first tree is surely none of the second; False when no root was
    found."""
    for name in sorted(names(gold)):
        try:
            shape = quadratic(gold, name)
            if shape is None or not (shape[0] or shape[1]):
                continue
            value = evaluate(_put(given, name, _root(*shape)))
        except (Unbounded, Undefined):
            continue
        if abs(value) > _CLEARLY:
            return True
    return False


def _root(square: Value, slope: Value, offset: Value) -> Value:
    """Return a root of square x^2 + slope x + offset."""
    if not square:
        return -offset / slope
    discriminant = slope**2 - 4 * square * offset
    return (REAL.sqrt(discriminant) - slope) / (2 * square)
