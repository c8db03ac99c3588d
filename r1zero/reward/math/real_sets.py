"""Sets of real numbers as unions of intervals, so that two ways to write one can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

from r1zero.reward.math.answer_types import Answer, AnswerGroup, Relation, Scalar, Sets
from r1zero.reward.math.formulas import close, is_rounded, names, quadratic
from r1zero.reward.math.normalize import AND, GE, LE, NE, OR
from r1zero.reward.math.tokens import Node
from r1zero.reward.math.values import REAL, Value, digits, evaluate


@dataclass(frozen=True, slots=True)
class Interval:
    """All numbers from low to high; an end belongs to it where it is closed. A point is closed at
    both."""

    low: Value
    high: Value
    low_closed: bool = False
    high_closed: bool = False

    @property
    def is_empty(self) -> bool:
        return self.low > self.high or (
            self.low == self.high and not (self.low_closed and self.high_closed)
        )

    def lower_end(self) -> tuple[Value, bool]:
        """Where it begins, as ends are ordered: an open one lies behind a closed one."""
        return self.low, not self.low_closed

    def upper_end(self) -> tuple[Value, bool]:
        """Where it ends, as ends are ordered: an open one lies before a closed one."""
        return self.high, self.high_closed


@dataclass(frozen=True, slots=True)
class RealSet:
    """Intervals in order and apart from each other; the variable that a relation named, if one
    did."""

    intervals: list[Interval]
    variable: str = ""


_LINE = Interval(-REAL.inf, REAL.inf)


def same_real_set(gold: Answer, given: Answer) -> bool | None:
    """Compare two sets of reals; None when one of the answers is none."""
    left = real_set(gold)
    right = real_set(given)
    if left is None or right is None:
        return None
    if len(left.intervals) != len(right.intervals):
        return False
    if left.variable and right.variable and left.variable != right.variable:
        return False
    rounded = any(map(is_rounded, [*_trees(gold), *_trees(given)]))
    return all(
        (mine.low_closed, mine.high_closed) == (other.low_closed, other.high_closed)
        and close(mine.low, other.low, rounded)
        and close(mine.high, other.high, rounded)
        for mine, other in zip(left.intervals, right.intervals, strict=True)
    )


def _trees(answer: Answer) -> Iterator[Node]:
    """Yield the formulas in an answer."""
    match answer:
        case Scalar():
            yield answer.tree
        case Relation():
            yield from answer.sides
        case AnswerGroup():
            for item in answer.items:
                yield from _trees(item)
        case Sets():
            for item in answer.joined + answer.removed:
                yield from _trees(item)


def real_set(answer: Answer) -> RealSet | None:
    """Return the set that an interval, an inequality, a union or a finite set of constants is; else
    None."""
    if isinstance(answer, Relation):
        return _solution(answer)
    if isinstance(answer, Sets):
        joined = _real_sets(answer.joined)
        removed = _real_sets(answer.removed)
        if joined is None or removed is None:
            return None
        whole = _union(joined)
        return reduce(_without, removed, whole)
    if isinstance(answer, Scalar):
        return _point(answer)
    if not isinstance(answer, AnswerGroup) or answer.brackets == ":":
        return None
    if answer.brackets in ("", "{}"):
        parts = _real_sets(answer.items)
        if not parts or (not answer.brackets and _is_mixed(answer.items)):
            return None
        if answer.brackets or answer.joint == OR:
            return _union(parts)
        return _all_of(parts, answer.joint)
    ends = [_constant(item) for item in answer.items]
    if len(ends) != 2 or None in ends:
        return None
    low, high = ends
    interval = Interval(low, high, answer.brackets[0] == "[", answer.brackets[1] == "]")
    if interval.is_empty:
        return None
    return RealSet([interval])


def _real_sets(answers: tuple[Answer, ...]) -> list[RealSet] | None:
    """The sets that answers are, or None if one of them is none."""
    found = []
    for answer in answers:
        each = real_set(answer)
        if each is None:
            return None
        found.append(each)
    return found


def _is_mixed(items: tuple[Answer, ...]) -> bool:
    """Tell whether inequalities stand beside a bare number: x > 3 or 7 are two answers."""
    numbers = [isinstance(item, Scalar) and not item.label for item in items]
    return any(numbers) and not all(numbers)


def _constant(answer: Answer) -> Value | None:
    if not isinstance(answer, Scalar) or names(answer.tree):
        return None
    value = digits(evaluate(answer.tree))
    if isinstance(value, REAL.mpc):
        return None
    return value


def _point(answer: Scalar) -> RealSet | None:
    value = _constant(answer)
    if value is None:
        return None
    return RealSet([Interval(value, value, True, True)], answer.label)


def _solution(relation: Relation) -> RealSet | None:
    """Solve one inequality, or a chain of two, in one variable on one side: 1 < x <= 2, |x - 1| <
    3."""
    sides = relation.sides
    signs = relation.signs
    places = [place for place, side in enumerate(sides) if names(side)]
    if len(places) != 1 or len(names(sides[places[0]])) != 1 or len(sides) > 3:
        return None
    tree = sides[places[0]]
    variable = min(names(tree))
    whole = RealSet([_LINE], variable)
    for place, sign in enumerate(signs):
        if places[0] == place:  # x < 2
            bound = sides[place + 1]
            direction = sign
        elif places[0] == place + 1:  # 2 < x, which is x > 2
            bound = sides[place]
            direction = MIRRORED[sign]
        else:
            return None  # 1 < 2 < x
        part = _solve(tree, variable, direction, digits(evaluate(bound)))
        if part is None:
            return None
        whole = _intersection(whole, part)
    return whole


def _solve(tree: Node, variable: str, sign: str, bound: Value) -> RealSet | None:
    """Solve `tree sign bound` where the tree is affine in its variable, or the absolute value of
    that."""
    if isinstance(bound, REAL.mpc):
        return None
    if tree.op == "call" and tree.name == "abs":
        if bound <= 0 or sign not in MIRRORED:
            return None
        above = _solve(tree.parts[0], variable, sign, bound)
        below = _solve(tree.parts[0], variable, MIRRORED[sign], -bound)
        if above is None or below is None:
            return None
        if sign in ("<", LE, NE):
            return _intersection(above, below)
        return _union([above, below])
    shape = quadratic(tree, variable)
    if shape is None or any(isinstance(value, REAL.mpc) for value in shape):
        return None
    square, slope, offset = shape
    if square or not slope:
        return None
    end = (bound - offset) / slope
    if slope > 0:
        return RealSet(_ray(sign, end), variable)
    return RealSet(_ray(MIRRORED[sign], end), variable)


MIRRORED = {"<": ">", ">": "<", LE: GE, GE: LE, NE: NE, "=": "="}


def _ray(sign: str, end: Value) -> list[Interval]:
    if sign == "=":
        return [Interval(end, end, True, True)]
    below = Interval(-REAL.inf, end, False, sign == LE)
    above = Interval(end, REAL.inf, sign == GE, False)
    if sign == NE:
        return [below, above]
    if sign in ("<", LE):
        return [below]
    return [above]


def _variable(sets: list[RealSet]) -> str:
    return next((each.variable for each in sets if each.variable), "")


def _union(sets: list[RealSet]) -> RealSet:
    intervals: list[Interval] = []
    for each_set in sets:
        intervals += each_set.intervals
    merged: list[Interval] = []
    for each in sorted(intervals, key=Interval.lower_end):
        if not merged or not _touch(merged[-1], each):
            merged.append(each)
            continue
        last = merged[-1]
        high, closed = max(last.upper_end(), each.upper_end())
        merged[-1] = Interval(last.low, high, last.low_closed, closed)
    return RealSet(merged, _variable(sets))


def _touch(left: Interval, right: Interval) -> bool:
    """Tell whether nothing lies between two intervals, the first of which begins first."""
    if right.low == left.high:
        return right.low_closed or left.high_closed
    return right.low < left.high


def _intersection(left: RealSet, right: RealSet) -> RealSet:
    found = []
    for mine in left.intervals:
        for other in right.intervals:
            low, low_open = max(mine.lower_end(), other.lower_end())
            high, high_closed = min(mine.upper_end(), other.upper_end())
            found.append(Interval(low, high, not low_open, high_closed))
    return RealSet([each for each in found if not each.is_empty], _variable([left, right]))


def _without(whole: RealSet, removed: RealSet) -> RealSet:
    rest = whole
    for each in removed.intervals:
        below = Interval(-REAL.inf, each.low, False, not each.low_closed)
        above = Interval(each.high, REAL.inf, not each.high_closed, False)
        rest = _intersection(rest, RealSet([below, above]))
    return rest


def _all_of(parts: list[RealSet], joint: str) -> RealSet:
    """Return what "and" means; a comma means "and" too, unless nothing would be left."""
    common = reduce(_intersection, parts)
    if common.intervals or joint == AND:
        return common
    return _union(parts)
