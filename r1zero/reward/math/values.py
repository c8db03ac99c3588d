"""What a formula is worth: an exact fraction as long as it can be, else a number of 60 digits.

Nothing here can run away: a power or a factorial too large to write is Unbounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias
from zlib import crc32

from mpmath import MPContext  # which sympy is built on

from r1zero.reward.math.tokens import Node

REAL = MPContext()
REAL.dps = 60
# A Fraction, or an mpf or mpc of mpmath, which has no types: to the type checker all are Any, and
# is_exact tells them apart.
Value: TypeAlias = Any

MAX_BITS = 20_000  # of an exact number, and of the exponent of others
MANY_DIGITS = 2600
MANY_DIGITS_BITS = 8_192  # what MAX_BITS is meanwhile: so many digits show every such number
_EXTREME_BITS = 66  # 10^20
_NOISE_BITS = 182  # 10^-55: what 60 digits may leave of a zero is smaller


@dataclass(slots=True)
class _Work:
    """How finely values are compared at the moment, and whether that may have been too coarse."""

    same: Value = REAL.mpf(10) ** -40  # the share by which equal values may differ
    nothing: Value = REAL.mpf(10) ** -50  # what may be left of a zero
    max_bits: int = MAX_BITS
    extreme: bool = False  # a number beyond 10^20 or below 10^-20 was met, which others may swallow


WORK = _Work()


@contextmanager
def more_digits() -> Iterator[None]:
    r"""Compare with 2600 digits instead of 60, where `x + 10^{-50}` is not `x`."""
    usual = (REAL.dps, WORK.same, WORK.nothing, WORK.max_bits)
    REAL.dps = MANY_DIGITS
    WORK.max_bits = MANY_DIGITS_BITS
    WORK.same = REAL.mpf(10) ** (20 - MANY_DIGITS)
    WORK.nothing = REAL.mpf(10) ** (10 - MANY_DIGITS)
    try:
        yield
    finally:
        REAL.dps, WORK.same, WORK.nothing, WORK.max_bits = usual


class Unbounded(ValueError):
    """This number is too large to compare."""


class Undefined(ValueError):
    """This has no value, such as 1/0."""


def evaluate(node: Node, point: int = 0) -> Value:
    """Return the value of a tree where its names have the values of a point; raise Unbounded or
    Undefined."""
    if node.op == "number":
        return node.value
    if node.op == "name":
        return _name(node.name, point)
    parts = [evaluate(part, point) for part in node.parts]
    try:
        if node.op == "call":
            value = _call(node.name, parts)
        else:
            value = _OPERATIONS[node.op](*parts)
    except (Unbounded, Undefined):
        raise
    except (ArithmeticError, ValueError) as error:  # of mpmath: a pole, an overflow
        raise Undefined(str(error)) from error
    if any(isinstance(part, REAL.mpc) for part in parts):
        value = REAL.mpc(value)  # what was complex on the way has left the reals
    return _bounded(value)


def _bounded(value: Value) -> Value:
    if isinstance(value, Fraction):
        _check_size(max(value.numerator.bit_length(), value.denominator.bit_length()))
        return value
    if REAL.isnan(value):
        raise Undefined("this has no value")
    if REAL.isinf(value) or value == 0:
        size = 0
    else:
        size = REAL.mag(value)
    if abs(size) > MAX_BITS:
        raise Unbounded("this number is too large")
    if size > _EXTREME_BITS or -_NOISE_BITS < size < -_EXTREME_BITS:
        WORK.extreme = True
    return value


def _check_size(bits: Value) -> None:
    """Take note of a number, or of an exponent, of this size."""
    if bits > WORK.max_bits:
        raise Unbounded("this number is too large")
    if bits > _EXTREME_BITS:
        WORK.extreme = True


def _name(name: str, point: int) -> Value:
    """Return a constant, or the value of a variable at a point: its own, the same in every
    process."""
    if name in CONSTANTS:
        return +CONSTANTS[name]  # with as many digits as there are
    share = REAL.mpf(crc32(f"{name}{point}".encode())) / 2**32
    low, high = ((0.1, 0.9), (1.1, 2.9), (0.2, 3.0), (-3.0, 3.0), (-3.0, 3.0), (-0.9, -0.1))[point]
    return low + (high - low) * share


POINTS = 6
CONSTANTS = {"pi": REAL.pi, "e": REAL.e, "i": REAL.mpc(0, 1), "infinity": REAL.inf}


def digits(value: Value) -> Value:
    """Return a value as digits."""
    if isinstance(value, Fraction):
        return REAL.mpf(value.numerator) / value.denominator
    return value


def is_exact(*values: Value) -> bool:
    """Tell whether all these are exact."""
    return all(isinstance(value, Fraction) for value in values)


def _add(*terms: Value) -> Value:
    if is_exact(*terms):
        return sum(terms[1:], terms[0])
    return REAL.fsum(map(digits, terms))


def _multiply(*factors: Value) -> Value:
    result = factors[0]
    for factor in factors[1:]:
        result = _bounded(
            result * factor if is_exact(result, factor) else digits(result) * digits(factor)
        )
    return result


def _divide(top: Value, bottom: Value) -> Value:
    if is_exact(top, bottom):
        return top / bottom
    return digits(top) / digits(bottom)


def _power(base: Value, exponent: Value) -> Value:
    if is_exact(exponent) and exponent.denominator == 1 and is_exact(base):
        bits = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
        if base not in (0, 1, -1):
            _check_size(abs(exponent) * (bits - 1 or 1))
        if base in (1, -1):
            if exponent % 2:
                return base
            return Fraction(1)
        return base**exponent.numerator
    root = _odd_root(base, exponent)
    if root is not None:
        return root
    base = digits(base)
    power = digits(exponent)
    if base and not REAL.isinf(base) and not REAL.isinf(power):
        _check_size(abs(power) * max(abs(REAL.mag(base)), 4))
    return REAL.power(
        base, int(exponent) if is_exact(exponent) and exponent.denominator == 1 else power
    )


def _odd_root(base: Value, exponent: Value) -> Value | None:
    """Return the real root that -8 has with the exponent 1/3, or None where powers need no such
    care."""
    if (
        not is_exact(exponent)
        or exponent.denominator % 2 == 0
        or isinstance(base, REAL.mpc)
        or base >= 0
    ):
        return None
    if exponent.denominator == 1 or abs(exponent) > MAX_BITS:
        return None
    if exponent.numerator % 2:
        sign = -1
    else:
        sign = 1
    return sign * REAL.power(digits(-base), digits(exponent))


def _root(inner: Value, index: Value) -> Value:
    return _power(inner, _divide(Fraction(1), index))


def _factorial(value: Value) -> Value:
    value = digits(value)
    if abs(value) > 1500:
        raise Unbounded("this factorial is too large")
    if isinstance(value, REAL.mpf) and value >= 0 and value == int(value):
        result = 1
        for factor in range(2, int(value) + 1):
            result *= factor
        return Fraction(result)
    return REAL.gamma(value + 1)


def _binomial(top: Value, bottom: Value) -> Value:
    if abs(digits(top)) > 1500 or abs(digits(bottom)) > 1500:
        raise Unbounded("this binomial is too large")
    value = REAL.binomial(digits(top), digits(bottom))
    if is_exact(top, bottom) and top.denominator == bottom.denominator == 1 and 0 <= bottom <= top:
        result = Fraction(1)
        for step in range(int(bottom)):
            result = result * (top - step) / (step + 1)
        return result
    return value


def _exp(value: Value) -> Value:
    value = digits(value)
    if not REAL.isinf(value):
        _check_size(2 * abs(value))
    return REAL.exp(value)


def _log(value: Value, base: Value = Fraction(10)) -> Value:
    return REAL.ln(digits(value)) / REAL.ln(digits(base))


def _floor(value: Value) -> Value:
    if is_exact(value):
        return Fraction(value.__floor__())
    return REAL.floor(value + WORK.nothing)


def _ceil(value: Value) -> Value:
    if is_exact(value):
        return Fraction(value.__ceil__())
    return REAL.ceil(value - WORK.nothing)


def _whole(*values: Value) -> list[int]:
    if not is_exact(*values) or any(value.denominator > 1 for value in values):
        raise Undefined("these are not all whole numbers")
    return [value.numerator for value in values]


def _remainder(value: Value, modulus: Value) -> Value:
    dividend, divisor = _whole(value, modulus)
    return Fraction(dividend % divisor)


def _gcd(*values: Value) -> Value:
    return Fraction(math.gcd(*_whole(*values)))


def _lcm(*values: Value) -> Value:
    return Fraction(math.lcm(*_whole(*values)))


def _largest(*values: Value) -> Value:
    return max(values, key=_real)


def _smallest(*values: Value) -> Value:
    return min(values, key=_real)


def _real(value: Value) -> Value:
    if isinstance(value, REAL.mpc):
        raise Undefined("complex numbers have no order")
    return digits(value)


_OPERATIONS: dict[str, Callable[..., Value]] = {
    "add": _add,
    "mul": _multiply,
    "div": _divide,
    "neg": lambda value: -value,
    "pow": _power,
    "root": _root,
    "factorial": _factorial,
    "binomial": _binomial,
    "mod": _remainder,
}
_OWN: dict[str, Callable[..., Value]] = {
    "exp": _exp,
    "log": _log,
    "abs": abs,
    "floor": _floor,
    "ceil": _ceil,
    "gcd": _gcd,
    "lcm": _lcm,
    "max": _largest,
    "min": _smallest,
}


_LIBRARY: dict[str, Callable[[Value], Value]] = {
    "sin": REAL.sin, "cos": REAL.cos, "tan": REAL.tan, "cot": REAL.cot, "sec": REAL.sec, "csc": REAL.csc,
    "arcsin": REAL.asin, "arccos": REAL.acos, "arctan": REAL.atan, "arccot": REAL.acot, "arcsec": REAL.asec,
    "arccsc": REAL.acsc, "sinh": REAL.sinh, "cosh": REAL.cosh, "tanh": REAL.tanh, "coth": REAL.coth,
    "sech": REAL.sech, "csch": REAL.csch, "arcsinh": REAL.asinh, "arccosh": REAL.acosh, "arctanh": REAL.atanh,
    "ln": REAL.ln, "cis": REAL.expj,
}  # fmt: skip


def _call(name: str, parts: list[Value]) -> Value:
    if name in _OWN:
        return _OWN[name](*parts)
    if name not in _LIBRARY or len(parts) > 1:
        raise Undefined(f"{name} is unknown")
    value = digits(parts[0])
    if not REAL.isinf(value) and abs(value) > MAX_BITS / 2:
        raise Unbounded("this is too large")
    return _LIBRARY[name](value)
