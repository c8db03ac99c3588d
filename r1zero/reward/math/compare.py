"""Comparison of two parsed answers, type by type; None where only algebra could tell."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
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
from r1zero.reward.math.formulas import is_plain, names, same_formula
from r1zero.reward.math.normalize import AND
from r1zero.reward.math.real_sets import real_set, same_real_set
from r1zero.reward.math.relations import (
    as_relation,
    is_condition,
    is_function_of_angle,
    is_statement,
    is_unsolved,
    same_relation,
    states,
)
from r1zero.reward.math.tokens import Node, is_whole
from r1zero.reward.math.units import scales
from r1zero.reward.math.values import Value, digits, evaluate

_VARIABLE = re.compile(r"(?:[A-Za-z]|\\\w+)(?P<index>_.*)?")
MAX_ITEMS = 60  # of a list in which formulas may stand in any order


def same_answer(gold: Answer, given: Answer) -> bool | None:
    """Compare two answers, the first of them the right one."""
    match gold, given:
        case Scalar(), Scalar():
            return _same_scalar(gold, given) or _same_quotient(gold, given)
        case Matrix(), Matrix():
            return _same_items(_row_points(gold), _row_points(given))
        case Matrix(), AnswerGroup():
            return _same_vector(gold, given)
        case AnswerGroup(), Matrix():
            return _same_vector(given, gold)
        case Based(), Based():
            return gold == given
        case Based(), Scalar():
            return gold.digits.isdigit() and _is_number(given, int(gold.digits))
        case Scalar(), Based(base=10):
            return given.digits.isdigit() and _is_number(gold, int(given.digits))
        case Words(), Words():
            return gold == given
        case AnswerGroup(), AnswerGroup():
            return _same_group(gold, given)
        case AnswerGroup(), Scalar():
            return _same_single(gold, given)
        case Scalar(), AnswerGroup():
            return _same_single(given, gold)
        case Scalar(), Relation() if not names(gold.tree) and ":" not in gold.label:
            return not gold.label and is_statement(given) and states(given, gold)
        case Relation(), Scalar() if is_function_of_angle(gold):
            return not given.label and states(gold, given)
    return _same_condition(gold, given)


# --- numbers and formulas -------------------------------------------------------------------------


def _same_scalar(gold: Scalar, given: Scalar) -> bool:
    """Compare two formulas with their units and names."""
    if _labels_clash(gold.label, given.label):
        return False
    pairs = scales(gold.unit, given.unit)
    if len(pairs) > 1 and (_is_share(gold) or _is_share(given)):
        pairs = pairs[1:]
    if given.unit.name == "%" != gold.unit.name:
        if not is_plain(given.tree):
            return False
        if is_whole(gold.tree) and evaluate(gold.tree) > 1:
            pairs = pairs[:1]  # 12 is 12%, if the problem asks for percents, but not 1200%
    if any(
        same_formula(_scaled(gold.tree, mine), _scaled(given.tree, other)) for mine, other in pairs
    ):
        return True
    if gold.letters is None and given.letters is None:
        return False
    return same_formula(gold.letters or gold.tree, given.letters or given.tree)


def _same_quotient(gold: Scalar, given: Scalar) -> bool | None:
    """Compare x/y = 4 with x = 4y."""
    left = as_relation(gold)
    right = as_relation(given)
    if ":" not in gold.label or left is None or right is None:
        return False
    return same_relation(left, right)


def _is_share(scalar: Scalar) -> bool:
    """Tell whether this is a bare number below 1: 0.5 is 50%, and never 0.5%."""
    if scalar.unit.name or names(scalar.tree):
        return False
    return abs(digits(evaluate(scalar.tree))) < 1


def _scaled(tree: Node, factor: Value) -> Node:
    if factor == 1:
        return tree
    return Node("mul", (Node("number", value=factor), tree))


def _labels_clash(gold: str, given: str) -> bool:
    """Tell whether these are different variables; an index, a word or a function clashes with
    nothing."""
    if ":" in gold and ":" in given:
        return gold != given
    left = _VARIABLE.fullmatch(gold)
    right = _VARIABLE.fullmatch(given)
    if not left or not right or "(" in gold + given:
        return False
    if left["index"] and right["index"]:
        return gold != given and gold[0] != given[0]
    return gold.removesuffix(left["index"] or "") != given.removesuffix(right["index"] or "")


def _is_number(answer: Answer, value: int) -> bool:
    return isinstance(answer, Scalar) and not names(answer.tree) and evaluate(answer.tree) == value


# --- lists ----------------------------------------------------------------------------------------


def _same_group(gold: AnswerGroup, given: AnswerGroup) -> bool | None:
    """Compare points and intervals by order, sets without; a bare list may stand for either.

    Values with names go by name: `y=2,x=1` is the point (1, 2), and 1, 2. A set is never a point or
    interval.
    """
    if (gold.brackets != given.brackets or gold.unordered) and any(
        isinstance(item, Relation | Sets) for item in gold.items + given.items
    ):
        return _same_condition(gold, given)
    if ":" in (gold.brackets, given.brackets):
        return gold.brackets == given.brackets and _same_ratio(gold, given)
    if gold.unordered and given.unordered:
        if gold.names and given.brackets == "" and not any(map(_name, given.items)):
            return _same_items(_in_order(gold), given.items)
        return _same_unordered(gold, given)
    if gold.brackets != given.brackets and {gold.brackets, given.brackets} != {"", "()"}:
        return False
    if gold.names and given.names:
        return _same_items(sorted(gold.items, key=_name), sorted(given.items, key=_name))
    return _same_items(_in_order(gold), _in_order(given))


def _name(item: Answer) -> str:
    if isinstance(item, Scalar):
        return item.label
    return ""


def _in_order(group: AnswerGroup) -> Sequence[Answer]:
    """Return values as they are written, but y = 2, x = 1 by the alphabet, as coordinates."""
    row = "".join(sorted(group.names))
    if row and row in string.ascii_lowercase:
        return sorted(group.items, key=_name)
    return group.items


def _same_items(gold: Sequence[Answer], given: Sequence[Answer]) -> bool | None:
    """Compare items in order."""
    if len(gold) != len(given):
        return False
    verdicts = [same_answer(mine, other) for mine, other in zip(gold, given, strict=True)]
    if False in verdicts:
        return False
    if None in verdicts:
        return None
    return True


def _same_unordered(gold: AnswerGroup, given: AnswerGroup) -> bool:
    """Find a partner for each item; in sets, items may be written twice."""
    left = list(gold.items)
    right = list(given.items)
    if gold.brackets == given.brackets == "{}":
        left = _distinct(left)
        right = _distinct(right)
    if len(left) != len(right):
        return False
    if len(left) > MAX_ITEMS:
        return bool(_same_items(left, right))
    for item in left:
        partner = _partner(item, right)
        if partner is None:
            return False
        del right[partner]
    return True


def _partner(item: Answer, others: list[Answer]) -> int | None:
    """Return the place of the first answer that is the same; None where there is none."""
    for place, other in enumerate(others):
        if same_answer(item, other):
            return place
    return None


def _distinct(items: list[Answer]) -> list[Answer]:
    kept: list[Answer] = []
    for item in items[:MAX_ITEMS]:
        if not any(same_answer(other, item) for other in kept):
            kept.append(item)
    return kept + items[MAX_ITEMS:]


def _same_ratio(gold: AnswerGroup, given: AnswerGroup) -> bool | None:
    """Compare 2:4 and 1:2 as ratios, but times of day as they stand."""
    mine = gold.scalars
    theirs = _by_name_of(gold.label, given).scalars
    assert mine is not None and theirs is not None, "a ratio is one of numbers"
    if len(mine) != len(theirs):
        return False
    if gold.clock != given.clock and (_is_time(gold) or _is_time(given)):
        return False
    is_ratio = not any(item.unit.name or _is_zero(item) for item in mine + theirs)
    if not is_ratio or (gold.clock and given.clock):
        return _same_items(mine, theirs)
    first = mine[0].tree
    other = theirs[0].tree
    return all(
        same_formula(Node("mul", (left.tree, other)), Node("mul", (right.tree, first)))
        for left, right in zip(mine, theirs, strict=True)
    )


def _by_name_of(label: str, ratio: AnswerGroup) -> AnswerGroup:
    """Return T:S = 32:7 in the order of another name, S:T; without parts if the names differ."""
    if not label or not ratio.label:
        return ratio
    members = dict(zip(ratio.label.split(":"), ratio.items, strict=False))
    wanted = label.split(":")
    if set(wanted) == set(members):
        return replace(ratio, items=tuple(members[name] for name in wanted))
    return replace(ratio, items=())


def _is_time(group: AnswerGroup) -> bool:
    """Tell whether this is a time of day and surely no ratio: 5:00, 3:05."""
    return group.clock and any(evaluate(item.tree) < 10 for item in (group.scalars or ())[1:])


def _is_zero(item: Scalar) -> bool:
    return not names(item.tree) and not evaluate(item.tree)


def _same_single(group: AnswerGroup, scalar: Scalar) -> bool | None:
    """Compare a list with a number: a set of one, a ratio of two, or 2 hours and 30 minutes."""
    if group.brackets == "{}" and len(group.items) == 1:
        return same_answer(group.items[0], scalar)
    items = group.scalars
    if items is None:
        return False
    if group.brackets == ":" and len(items) == 2 and not any(item.unit.name for item in items):
        if _is_time(group) or _labels_clash(group.label, scalar.label):
            return False
        return same_formula(Node("div", (items[0].tree, items[1].tree)), scalar.tree)
    measures = {item.unit.measures for item in items}
    sizes = [item.unit.size for item in items]
    if group.joint != AND or not scalar.unit.measures or measures != {scalar.unit.measures}:
        return False
    if sizes != sorted(set(sizes), reverse=True):
        return False
    total = Node("add", tuple(_scaled(item.tree, item.unit.size) for item in items))
    return same_formula(total, _scaled(scalar.tree, scalar.unit.size))


def _same_vector(matrix: Matrix, group: AnswerGroup) -> bool | None:
    """Compare a matrix with one column or row with a point, or a matrix with its rows in
    brackets."""
    if group.brackets not in ("()", "[]"):
        return False
    rows = matrix.rows
    if len(rows) == 1 or all(len(row) == 1 for row in rows):
        cells = [cell for row in rows for cell in row]
        if all(isinstance(item, Scalar) for item in group.items):
            return _same_items(cells, group.items)
    return _same_items(_row_points(matrix), [_as_point(item) for item in group.items])


def _row_points(matrix: Matrix) -> list[AnswerGroup]:
    return [AnswerGroup("()", row) for row in matrix.rows]


def _as_point(answer: Answer) -> Answer:
    if isinstance(answer, AnswerGroup) and answer.brackets == "[]":
        return AnswerGroup("()", answer.items)
    return answer


# --- equations, inequalities, sets of reals -------------------------------------------------------


def _same_condition(gold: Answer, given: Answer) -> bool | None:
    """Compare what holds: as sets of reals where that can be had, else as relations."""
    if is_unsolved(given) and not is_unsolved(gold):
        return False
    if is_condition(gold) or is_condition(given):
        verdict = same_real_set(gold, given)
    else:
        verdict = False
    if verdict is not None:
        return verdict
    left = as_relation(gold)
    right = as_relation(given)
    if left and right:
        return same_relation(left, right)
    if isinstance(gold, Scalar | Words | Matrix) or isinstance(given, Scalar | Words | Matrix):
        return False
    if _is_set_beside_none(gold, given) or _is_set_beside_none(given, gold):
        return False
    if not isinstance(gold, AnswerGroup) or not isinstance(given, AnswerGroup):
        return None
    if gold.unordered and given.unordered:
        return _same_unordered(gold, given)
    return None


def _is_set_beside_none(answer: Answer, other: Answer) -> bool:
    """Tell whether the first is a set of reals, and the second says nothing about one."""
    return real_set(answer) is not None and not is_condition(other)
