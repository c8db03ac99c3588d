"""The comparisons that only a computer algebra system can make, by math-verify and sympy."""

from __future__ import annotations

import re
from functools import lru_cache

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Eq, Expr, I, Symbol
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

MAX_CHARACTERS = 300
# Towers of powers, and numbers that nobody writes: sympy would work them out.
_HOPELESS = re.compile(r"\^[^A-Za-z=,]*\^|[0-9]{40}|[0-9]{4} ?[!}]* ?!|\^ ?\{? ?[0-9]{5}|![ )}]*!")

# Units are read by us: math-verify would take letters such as the m of x + m for one.
_NORMALIZATION = NormalizationConfig(units=False, malformed_operators=True, nits=True)
_TARGETS = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=_NORMALIZATION)]


@lru_cache(maxsize=4096)
def _parse_gold(text: str) -> list[object]:
    return _parse(text)


def _parse(text: str) -> list[object]:
    """Return what math-verify makes of one LaTeX expression: sympy objects, then the text."""
    parsed = parse("\\boxed{" + text.replace("$", "") + "}", _TARGETS, parsing_timeout=None)
    return [_with_imaginary(item) for item in parsed]


def _with_imaginary(item: object) -> object:
    """Read a variable i as the imaginary unit, which is what answers mean by it."""
    if not isinstance(item, Expr):
        return item
    try:
        return item.xreplace({symbol: I for symbol in item.free_symbols if symbol.name == "i"})
    except (TypeError, ValueError):  # max(i, 2)
        return item


def same_algebra(gold: str, given: str) -> bool:
    """Compare two LaTeX answers through sympy; what it cannot read is not the same. May never
    end."""
    if (
        max(len(gold), len(given)) > MAX_CHARACTERS
        or _HOPELESS.search(gold)
        or _HOPELESS.search(given)
    ):
        return False
    right = _parse_gold(gold)
    answer = _parse(given)
    if right and answer and _is_open_equation(right[0]) and not isinstance(answer[0], Relational):
        return False
    return verify(right, answer, allow_set_relation_comp=True, timeout_seconds=None)


def _is_open_equation(item: object) -> bool:
    """Tell whether this is an equation that does not just name its right side: x + y = 1, not y =
    1."""
    return isinstance(item, Eq) and not isinstance(item.lhs, (Symbol, AppliedUndef))
