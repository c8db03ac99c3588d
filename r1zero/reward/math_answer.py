"""Whether two answers are the same mathematics: plain kinds read here, the rest by math-verify and sympy.

Loads sympy; only the processes of the judge import this. Nothing here limits time: some comparisons never
end, and the process that runs them is killed.
"""

from __future__ import annotations

import re
from functools import lru_cache

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Eq, Expr, I, Symbol
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from r1zero.reward.plain import clean, same_plain

MAX_CHARACTERS = 1000  # of an answer; the longest right answer of MATH has 159

# Units are read in plain.py: math-verify would take letters such as the m of x + m for one.
_NORMALIZATION = NormalizationConfig(units=False, malformed_operators=True, nits=True)
_TARGETS = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=_NORMALIZATION)]
_UNIT_BEHIND = re.compile(
    r"(?<=[0-9A-Za-z})\]]) ?\\text ?\{[^{}0-9]*\}(?: ?\^ ?\{?[23]\}?)?$"
    r"|(?<=[0-9})]) ?(?:\\?%|\$|[\u4e00-\u9fff]+)$"
    r"|(?<=[0-9})]) ?(?:square |sq |cubic )?(?:[cmk]m|inches|feet|meters|units|degrees)(?: ?\^ ?\{?[23]\}?)?$"
)


def _parse(text: str) -> list[object]:
    """Return what math-verify makes of one LaTeX expression: sympy objects, then the text."""
    parsed = parse("\\boxed{" + _UNIT_BEHIND.sub("", text) + "}", _TARGETS, parsing_timeout=None)
    return [_with_imaginary(item) for item in parsed]


def _with_imaginary(item: object) -> object:
    """Read a variable i as the imaginary unit, which is what answers mean by it."""
    if isinstance(item, Expr) and _imaginary_in(item):
        return item.xreplace({symbol: I for symbol in item.free_symbols if symbol.name == "i"})
    return item


def _imaginary_in(item: Expr) -> bool:
    return any(symbol.name == "i" for symbol in item.free_symbols)


@lru_cache(maxsize=4096)
def _parse_gold(text: str) -> list[object]:
    return _parse(text)


def same(gold: str, given: str) -> bool:
    """Tell whether a given answer is the right one. Both are LaTeX or plain text without dollar signs."""
    if max(len(gold), len(given)) > MAX_CHARACTERS:
        return False
    gold, given = clean(gold), clean(given)
    if not given or not gold:
        return False
    if gold.replace(" ", "") == given.replace(" ", ""):
        return True
    plain = same_plain(gold, given)
    return _same_algebra(gold, given) if plain is None else plain


def _same_algebra(gold: str, given: str) -> bool:
    """Compare through sympy; what sympy cannot read or compare is not the same."""
    right, answer = _parse_gold(gold), _parse(given)
    if right and answer and _is_open_equation(right[0]) and not isinstance(answer[0], Relational):
        return False
    return verify(right, answer, allow_set_relation_comp=True, timeout_seconds=None)


def _is_open_equation(item: object) -> bool:
    """Tell whether this is an equation that does not just name its right side: x + y = 1, not y = 1."""
    return isinstance(item, Eq) and not isinstance(item.lhs, (Symbol, AppliedUndef))
