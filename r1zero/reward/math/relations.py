"""Equations and inequalities: which are solved, what they state, which two say the same."""

from __future__ import annotations

import re

from r1zero.reward.math.answer_types import Answer, AnswerGroup, Relation, Scalar, Sets
from r1zero.reward.math.formulas import constant_ratio, differ_on_roots, names, same_formula
from r1zero.reward.math.real_sets import MIRRORED
from r1zero.reward.math.tokens import TRIGONOMETRIC, Node
from r1zero.reward.math.values import REAL


def is_statement(relation: Relation) -> bool:
    """Tell whether this says what a term is worth: a + b = 5 or sin A = 3/5, but not 3x = 5."""
    terms = [side for side in relation.sides if names(side)]
    if relation.signs != ("=",) or len(terms) != 1:
        return False
    if terms[0].name in TRIGONOMETRIC:
        return True
    return len(names(terms[0])) > 1 and not _has_coefficient(terms[0])


def _has_coefficient(term: Node) -> bool:
    """Tell whether there is a number other than an exponent: in 2x + 3y, but not in x^2 + y^2."""
    if term.op == "pow":
        parts = term.parts[:1]
    else:
        parts = term.parts
    return term.op == "number" or any(map(_has_coefficient, parts))


def states(statement: Relation, value: Scalar) -> bool:
    """Tell whether this is what the statement says a term is worth."""
    return any(not names(side) and same_formula(value.tree, side) for side in statement.sides)


def is_function_of_angle(relation: Relation) -> bool:
    r"""Tell whether this says what \sin A is, which may be given without that name."""
    named = relation.sides[0]
    return is_statement(relation) and named.name in TRIGONOMETRIC and named.parts[0].op == "name"


def is_unsolved(answer: Answer) -> bool:
    """Tell whether a relation in one variable is yet to be solved: 3x + 5 = 29, but not |x| < 3."""
    match answer:
        case AnswerGroup():
            return any(map(is_unsolved, answer.items))
        case Sets():
            return any(map(is_unsolved, answer.joined + answer.removed))
        case Relation() if not is_statement(answer):
            terms = [side for side in answer.sides if names(side)]
            variables = set().union(*map(names, terms))
            return len(variables) == 1 and not all(_is_solved(term, answer.signs) for term in terms)
    return False


def _is_solved(term: Node, signs: tuple[str, ...]) -> bool:
    return term.op == "name" or (term.name == "abs" and "=" not in signs)


def is_condition(answer: Answer) -> bool:
    if isinstance(answer, AnswerGroup):
        return any(map(is_condition, answer.items))
    return isinstance(answer, Relation | Sets)


def as_relation(answer: Answer) -> Relation | None:
    r"""Return a relation, and `y = 2x` or `x/y = 2` as one."""
    if isinstance(answer, Relation):
        return answer
    if not isinstance(answer, Scalar) or not re.fullmatch("[A-Za-z](:[A-Za-z])?", answer.label):
        return None
    members = tuple(Node("name", name=letter) for letter in answer.label.split(":"))
    if len(members) == 1:
        named = members[0]
    else:
        named = Node("div", members)
    return Relation((named, answer.tree), ("=",))


def same_relation(gold: Relation, given: Relation) -> bool | None:
    """Compare relations up to a factor: x + y = 1 and 2 = 2x + 2y; -x < 1 and x > -1."""
    for relation in (given, _turned(given)):
        if gold.signs == relation.signs and all(map(same_formula, gold.sides, relation.sides)):
            return True
    if len(gold.sides) != len(given.sides):
        return None
    if len(gold.sides) != 2:
        return False
    left = _difference(gold)
    right = _difference(given)
    if names(left) != names(right):
        return False
    ratio = constant_ratio(left, right)
    if ratio is None or isinstance(ratio, REAL.mpc):
        if differ_on_roots(left, right) or differ_on_roots(right, left):
            return False
        return None
    if ratio > 0:
        return given.signs[0] == gold.signs[0]
    return given.signs[0] == MIRRORED[gold.signs[0]]


def _turned(relation: Relation) -> Relation:
    """Return a relation read from its end: 1 < x as x > 1."""
    signs = tuple(MIRRORED[sign] for sign in reversed(relation.signs))
    return Relation(relation.sides[::-1], signs)


def _difference(relation: Relation) -> Node:
    return Node("add", (relation.sides[0], Node("neg", (relation.sides[1],))))
