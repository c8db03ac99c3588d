"""Whether two answers that were read are the same, kind by kind; None where only algebra could tell."""

from __future__ import annotations

import re
from collections.abc import Sequence

from r1zero.reward.formulas import constant_ratio, differ_on_roots, names, same_formula
from r1zero.reward.kinds import Answer, Based, Group, Matrix, Relation, Scalar, Sets, Words
from r1zero.reward.real_sets import real_set, same_real_set
from r1zero.reward.spelling import AND, GE, LE
from r1zero.reward.tokens import TRIGONOMETRIC, Node
from r1zero.reward.units import scales
from r1zero.reward.values import REAL, Value, digits, evaluate

_VARIABLE = re.compile(r"(?:[A-Za-z]|\\\w+)(?P<index>_.*)?")
MAX_ITEMS = 60  # of a list in which formulas may stand in any order
_MIRRORED = {"<": ">", ">": "<", LE: GE, GE: LE}


def same_answer(gold: Answer, given: Answer) -> bool | None:
    """Compare two answers, the first of them the right one."""
    match gold, given:
        case Scalar(), Scalar():
            return _same_scalar(gold, given)
        case Matrix(), Matrix():
            return _same_items(_row_points(gold), _row_points(given))
        case (Matrix(), Group()) | (Group(), Matrix()):
            return _same_vector(gold, given)
        case Based(), Based():
            return gold == given
        case Based(), Scalar():
            return gold.digits.isdigit() and _is_number(given, int(gold.digits))
        case Scalar(), Based(base=10):
            return given.digits.isdigit() and _is_number(gold, int(given.digits))
        case Words(), Words():
            return gold == given
        case Group(), Group():
            return _same_group(gold, given)
        case (Group(), Scalar()) | (Scalar(), Group()):
            return _same_single(gold, given)
        case Scalar(), Relation() if not gold.label and _is_statement(given):
            return any(not names(side) and same_formula(gold.tree, side) for side in given.sides)
    return _same_condition(gold, given)


# --- numbers and formulas -------------------------------------------------------------------------------


def _same_scalar(gold: Scalar, given: Scalar) -> bool:
    """Compare two formulas with their units and names."""
    if _labels_clash(gold.label, given.label):
        return False
    pairs = scales(gold.unit, given.unit)
    if len(pairs) > 1 and (_is_share(gold) or _is_share(given)):
        pairs = pairs[1:]
    if any(same_formula(_scaled(gold.tree, mine), _scaled(given.tree, other)) for mine, other in pairs):
        return True
    if gold.letters is None and given.letters is None:
        return False
    return same_formula(gold.letters or gold.tree, given.letters or given.tree)


def _is_share(scalar: Scalar) -> bool:
    """Tell whether this is a bare number below 1: 0.5 is 50%, and never 0.5%."""
    if scalar.unit.name or names(scalar.tree):
        return False
    return abs(digits(evaluate(scalar.tree))) < 1


def _scaled(tree: Node, factor: Value) -> Node:
    return tree if factor == 1 else Node("mul", (Node("number", value=factor), tree))


def _labels_clash(gold: str, given: str) -> bool:
    """Tell whether these are different variables; an index, a word or a function clashes with nothing."""
    left, right = _VARIABLE.fullmatch(gold), _VARIABLE.fullmatch(given)
    if not left or not right or "(" in gold + given:
        return False
    if left["index"] and right["index"]:
        return gold != given and gold[0] != given[0]
    return gold.removesuffix(left["index"] or "") != given.removesuffix(right["index"] or "")


def _is_number(answer: Answer, value: int) -> bool:
    return isinstance(answer, Scalar) and not names(answer.tree) and evaluate(answer.tree) == value


# --- lists ----------------------------------------------------------------------------------------------


def _same_group(gold: Group, given: Group) -> bool | None:
    """Compare points and intervals by order, sets without; a bare list may stand for either.

    Values with names go by name: `y=2,x=1` is the point (1, 2), and 1, 2. A set is never a point or interval.
    """
    if gold.brackets != given.brackets or gold.unordered:
        if any(isinstance(item, Relation | Sets) for item in gold.items + given.items):
            return _same_condition(gold, given)
    if ":" in (gold.brackets, given.brackets):
        return gold.brackets == given.brackets and _same_ratio(gold, given)
    if gold.unordered and given.unordered:
        if _has_names(gold) and given.brackets == "" and not any(map(_name, given.items)):
            return _same_items(_by_name(gold), given.items)
        return _same_unordered(gold, given)
    if gold.brackets == given.brackets:
        return _same_items(gold.items, given.items)
    if {gold.brackets, given.brackets} == {"", "()"}:
        return _same_items(_by_name(gold), _by_name(given))
    return False


def _name(item: Answer) -> str:
    return item.label if isinstance(item, Scalar) else ""


def _has_names(group: Group) -> bool:
    """Tell whether all values have a letter of their own: y = 2, x = 1."""
    letters = {label for label in map(_name, group.items) if len(label) == 1}
    return len(letters) == len(group.items)


def _by_name(group: Group) -> list[Answer]:
    return sorted(group.items, key=_name) if all(map(_name, group.items)) else list(group.items)


def _same_items(gold: Sequence[Answer], given: Sequence[Answer]) -> bool | None:
    """Compare items in order."""
    if len(gold) != len(given):
        return False
    verdicts = [same_answer(mine, other) for mine, other in zip(gold, given, strict=True)]
    return False if False in verdicts else None if None in verdicts else True


def _same_unordered(gold: Group, given: Group) -> bool:
    """Find a partner for each item; in sets, items may be written twice."""
    left, right = list(gold.items), list(given.items)
    if gold.brackets == given.brackets == "{}":
        left, right = _distinct(left), _distinct(right)
    if len(left) != len(right):
        return False
    if len(left) > MAX_ITEMS:
        return bool(_same_items(left, right))
    for item in left:
        partner = next((place for place, other in enumerate(right) if same_answer(item, other)), None)
        if partner is None:
            return False
        del right[partner]
    return True


def _distinct(items: list[Answer]) -> list[Answer]:
    kept: list[Answer] = []
    for item in items[:MAX_ITEMS]:
        if not any(same_answer(other, item) for other in kept):
            kept.append(item)
    return kept + items[MAX_ITEMS:]


def _same_ratio(gold: Group, given: Group) -> bool | None:
    """Compare 2:4 and 1:2 as ratios, but times of day as they stand."""
    items = gold.items + given.items
    if len(gold.items) != len(given.items) or not all(isinstance(item, Scalar) for item in items):
        return False
    if any(item.unit.name for item in items):
        return _same_items(gold.items, given.items)
    first, other = gold.items[0].tree, given.items[0].tree
    return all(
        same_formula(Node("mul", (mine.tree, other)), Node("mul", (theirs.tree, first)))
        for mine, theirs in zip(gold.items, given.items, strict=True)
    )


def _same_single(gold: Answer, given: Answer) -> bool | None:
    """Compare a list with a number: a set of one, a ratio of two, or 2 hours and 30 minutes."""
    group, scalar = (gold, given) if isinstance(gold, Group) else (given, gold)
    assert isinstance(group, Group) and isinstance(scalar, Scalar)
    items = group.items
    if group.brackets == "{}" and len(items) == 1:
        return same_answer(items[0], scalar)
    if not all(isinstance(item, Scalar) for item in items):
        return False
    if group.brackets == ":" and len(items) == 2 and not any(item.unit.name for item in items):
        return same_formula(Node("div", (items[0].tree, items[1].tree)), scalar.tree)
    measures, sizes = {item.unit.measures for item in items}, [item.unit.size for item in items]
    if group.joint != AND or not scalar.unit.measures or measures != {scalar.unit.measures}:
        return False
    if sizes != sorted(set(sizes), reverse=True):
        return False
    total = Node("add", tuple(_scaled(item.tree, item.unit.size) for item in items))
    return same_formula(total, _scaled(scalar.tree, scalar.unit.size))


def _same_vector(gold: Answer, given: Answer) -> bool | None:
    """Compare a matrix with one column or row with a point, or a matrix with its rows in brackets."""
    matrix, group = (gold, given) if isinstance(gold, Matrix) else (given, gold)
    assert isinstance(matrix, Matrix) and isinstance(group, Group)
    if group.brackets not in ("()", "[]"):
        return False
    rows = matrix.rows
    if len(rows) == 1 or all(len(row) == 1 for row in rows):
        cells = [cell for row in rows for cell in row]
        if all(isinstance(item, Scalar) for item in group.items):
            return _same_items(cells, group.items)
    return _same_items(_row_points(matrix), [_as_point(item) for item in group.items])


def _row_points(matrix: Matrix) -> list[Group]:
    return [Group("()", row) for row in matrix.rows]


def _as_point(answer: Answer) -> Answer:
    return Group("()", answer.items) if isinstance(answer, Group) and answer.brackets == "[]" else answer


# --- equations, inequalities, sets of reals -------------------------------------------------------------


def _same_condition(gold: Answer, given: Answer) -> bool | None:
    """Compare what holds: as sets of reals where that can be had, else as relations."""
    verdict = same_real_set(gold, given) if _is_condition(gold) or _is_condition(given) else False
    if verdict is not None:
        return verdict
    left, right = _as_relation(gold), _as_relation(given)
    if left and right:
        return _same_relation(left, right)
    if isinstance(gold, Scalar | Words | Matrix) or isinstance(given, Scalar | Words | Matrix):
        return False
    if any(real_set(side) and not _is_condition(other) for side, other in ((gold, given), (given, gold))):
        return False  # a set of reals, and something that is none
    if isinstance(gold, Group) and isinstance(given, Group):
        return _same_unordered(gold, given) if gold.unordered and given.unordered else None
    return None


def _is_statement(relation: Relation) -> bool:
    """Tell whether this says what a term is worth, a + b = 5 or sin A = 3/5; 3x = 5 is yet to be solved."""
    terms = [side for side in relation.sides if names(side)]
    if relation.signs != ("=",) or len(terms) != 1:
        return False
    return len(names(terms[0])) > 1 or terms[0].name in TRIGONOMETRIC


def _is_condition(answer: Answer) -> bool:
    if isinstance(answer, Group):
        return any(map(_is_condition, answer.items))
    return isinstance(answer, Relation | Sets)


def _as_relation(answer: Answer) -> Relation | None:
    r"""Return a relation, and `y = 2x` as one."""
    if isinstance(answer, Relation):
        return answer
    if isinstance(answer, Scalar) and re.fullmatch("[A-Za-z]", answer.label):
        return Relation((Node("name", name=answer.label), answer.tree), ("=",))
    return None


def _same_relation(gold: Relation, given: Relation) -> bool | None:
    """Compare relations up to a factor: x + y = 1 and 2 = 2x + 2y; -x < 1 and x > -1."""
    for relation in (given, _turned(given)):
        if gold.signs == relation.signs and all(map(same_formula, gold.sides, relation.sides)):
            return True
    if len(gold.sides) != 2 or len(given.sides) != 2:
        return None if len(gold.sides) != len(given.sides) else False
    left, right = _difference(gold), _difference(given)
    if names(left) != names(right):
        return False
    ratio = constant_ratio(left, right)
    if ratio is None or isinstance(ratio, REAL.mpc):
        return False if differ_on_roots(left, right) or differ_on_roots(right, left) else None
    sign = gold.signs[0]
    return given.signs[0] == (sign if ratio > 0 else _MIRRORED.get(sign, sign))


def _turned(relation: Relation) -> Relation:
    """Return a relation read from its end: 1 < x as x > 1."""
    signs = tuple(_MIRRORED.get(sign, sign) for sign in reversed(relation.signs))
    return Relation(relation.sides[::-1], signs)


def _difference(relation: Relation) -> Node:
    return Node("add", (relation.sides[0], Node("neg", (relation.sides[1],))))
