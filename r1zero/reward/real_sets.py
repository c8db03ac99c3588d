"""Sets of real numbers as unions of intervals, so that two ways to write one can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from r1zero.reward.formulas import close, names
from r1zero.reward.kinds import Answer, Group, Relation, Scalar, Sets
from r1zero.reward.spelling import AND, GE, LE, NE, OR
from r1zero.reward.values import REAL, Value, digits, evaluate


@dataclass(frozen=True, slots=True)
class Interval:
    """All numbers from low to high; an end belongs to it where it is closed. A point is closed at both."""

    low: Value
    high: Value
    low_closed: bool = False
    high_closed: bool = False

    @property
    def is_empty(self) -> bool:
        return self.low > self.high or (self.low == self.high and not (self.low_closed and self.high_closed))


@dataclass(frozen=True, slots=True)
class RealSet:
    """Intervals in order and apart from each other; the variable that a relation named, if one did."""

    intervals: list[Interval]
    variable: str = ""


_LINE = Interval(-REAL.inf, REAL.inf)


def same_real_set(gold: Answer, given: Answer) -> bool | None:
    """Compare two sets of reals; None when one of the answers is none."""
    left, right = real_set(gold), real_set(given)
    if left is None or right is None:
        return None
    if len(left.intervals) != len(right.intervals):
        return False
    if left.variable and right.variable and left.variable != right.variable:
        return False
    return all(
        (mine.low_closed, mine.high_closed) == (other.low_closed, other.high_closed)
        and close(mine.low, other.low, rounded=True)
        and close(mine.high, other.high, rounded=True)
        for mine, other in zip(left.intervals, right.intervals, strict=True)
    )


def real_set(answer: Answer) -> RealSet | None:
    """Return the set that an interval, an inequality, a union or a finite set of constants is; else None."""
    if isinstance(answer, Relation):
        return _solution(answer)
    if isinstance(answer, Sets):
        joined, removed = [list(map(real_set, part)) for part in (answer.joined, answer.removed)]
        if None in joined or None in removed:
            return None
        whole = _union(joined)
        return reduce(_without, removed, whole)
    if isinstance(answer, Scalar):
        return _point(answer)
    if not isinstance(answer, Group) or answer.brackets == ":":
        return None
    if answer.brackets in ("", "{}"):
        parts = list(map(real_set, answer.items))
        if None in parts or not parts:
            return None
        return _union(parts) if answer.brackets or answer.joint == OR else _all_of(parts, answer.joint)
    ends = list(map(_constant, answer.items))
    if len(ends) != 2 or None in ends:
        return None
    interval = Interval(*ends, answer.brackets[0] == "[", answer.brackets[1] == "]")
    return None if interval.is_empty else RealSet([interval])


def _constant(answer: Answer) -> Value | None:
    if not isinstance(answer, Scalar) or names(answer.tree):
        return None
    value = digits(evaluate(answer.tree))
    return None if isinstance(value, REAL.mpc) else value


def _point(answer: Scalar) -> RealSet | None:
    value = _constant(answer)
    return None if value is None else RealSet([Interval(value, value, True, True)], answer.label)


def _solution(relation: Relation) -> RealSet | None:
    """Solve an inequality, or a chain of two, that has its variable alone on one side."""
    sides = relation.sides
    places = [place for place, side in enumerate(sides) if side.op == "name" and names(side)]
    if len(places) != 1 or any(names(side) for place, side in enumerate(sides) if place != places[0]):
        return None
    values = [None if place in places else digits(evaluate(side)) for place, side in enumerate(sides)]
    if any(isinstance(value, REAL.mpc) for value in values) or len(sides) > 3:
        return None
    whole = RealSet([_LINE], sides[places[0]].name)
    for place, sign in enumerate(relation.signs):
        left, right = values[place], values[place + 1]
        if left is not None and right is not None:
            return None  # 1 < 2 < x
        part = _ray(sign, right) if left is None else _ray(_MIRRORED[sign], left)
        whole = _intersection(whole, RealSet(part))
    return whole


_MIRRORED = {"<": ">", ">": "<", LE: GE, GE: LE, NE: NE, "=": "="}


def _ray(sign: str, end: Value) -> list[Interval]:
    if sign == "=":
        return [Interval(end, end, True, True)]
    below, above = Interval(-REAL.inf, end, False, sign == LE), Interval(end, REAL.inf, sign == GE, False)
    return [below, above] if sign == NE else [below] if sign in ("<", LE) else [above]


def _variable(sets: list[RealSet]) -> str:
    return next((each.variable for each in sets if each.variable), "")


def _union(sets: list[RealSet]) -> RealSet:
    intervals = sorted(
        (it for each in sets for it in each.intervals), key=lambda it: (it.low, not it.low_closed)
    )
    merged: list[Interval] = []
    for each in intervals:
        last = merged[-1] if merged else None
        touching = last and (
            each.low < last.high or (each.low == last.high and (each.low_closed or last.high_closed))
        )
        if not touching:
            merged.append(each)
            continue
        high, closed = max((last.high, last.high_closed), (each.high, each.high_closed))
        merged[-1] = Interval(last.low, high, last.low_closed, closed)
    return RealSet(merged, _variable(sets))


def _intersection(left: RealSet, right: RealSet) -> RealSet:
    found = []
    for mine in left.intervals:
        for other in right.intervals:
            low, low_open = max((mine.low, not mine.low_closed), (other.low, not other.low_closed))
            high, high_closed = min((mine.high, mine.high_closed), (other.high, other.high_closed))
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
    return common if common.intervals or joint == AND else _union(parts)
