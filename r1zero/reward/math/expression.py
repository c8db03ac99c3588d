r"""One formula, as a tree: numbers, names, sums, products, powers, functions. No lists, no
relations.

The grammar is that of people who write answers: `2\frac{1}{2}` is a mixed number, `2x\sin 3x` a
product of three, `1/2x` half of x but `a/bc` a over bc. What it does not know is Unreadable, never
guessed.
"""

from __future__ import annotations

from collections.abc import Sequence

from r1zero.reward.math.normalize import DEGREE, INFINITY, MP, PI, PM, SET_CLOSE, SET_OPEN
from r1zero.reward.math.tokens import (
    CONSTANTS,
    FUNCTIONS,
    GREEK,
    OF_LISTS,
    TRIGONOMETRIC,
    Node,
    Token,
    Unreadable,
    is_whole,
    number,
    tokens,
)

MAX_DEPTH = 40  # of brackets, roots and powers
_REMAINDERS = ("bmod", "mod")
_BETWEEN = {"over": "div", "choose": "binomial"}
_END = Token("", "", False)
_LISTS = {"(": ")", "[": "]", "{": "}", SET_OPEN: SET_CLOSE}
_CLOSERS = (*_BETWEEN, *_REMAINDERS, "rfloor", "rceil")


def parse(text: str) -> Node:
    """Read a whole cleaned text as one formula; raise Unreadable."""
    parser = _Parser(tokens(text))
    tree = parser.sum()
    if parser.kind:
        raise Unreadable(f"{parser.text} is one too many")
    return tree


class _Parser:
    """Recursive descent; each method reads one level of the grammar and stands behind it
    afterwards."""

    def __init__(self, words: list[Token]) -> None:
        self._tokens = [*words, _END]
        self._place = 0
        self._depth = 0
        self._angle = 0  # how many trigonometric functions we are in: there degrees are numbers
        self._bars = 0  # how many absolute values are open

    @property
    def kind(self) -> str:
        return self._tokens[self._place].kind

    @property
    def text(self) -> str:
        return self._tokens[self._place].text

    def _is(self, symbols: str) -> bool:
        token = self._tokens[self._place]
        return token.kind == "symbol" and token.text in symbols

    def _take(self) -> Token:
        if self._tokens[self._place] is _END:
            raise Unreadable("it ends too early")
        self._place += 1
        return self._tokens[self._place - 1]

    def _expect(self, symbol: str) -> None:
        if not self._is(symbol):
            raise Unreadable(f"{symbol} is missing")
        self._place += 1

    def sum(self) -> Node:
        r"""Terms between plus, minus and plus-minus; `\over` and `\choose` divide the group they
        stand in."""
        terms = [self._product() if not self._is("+-" + PM + MP) else self._signed()]
        while self._is("+-" + PM + MP):
            terms.append(self._signed())
        if len(terms) == 1:
            total = terms[0]
        else:
            total = Node("add", tuple(terms))
        if self.kind == "command" and self.text in _BETWEEN:
            return Node(_BETWEEN[self._take().text], (total, self.sum()))
        return total

    def _signed(self) -> Node:
        sign = self._take().text
        if sign not in "+-":
            return Node("plus-minus", (self._product(),), name=sign)
        negative = self._minus_signs() != (sign == "-")
        term = self._product()
        if negative:
            return Node("neg", (term,))
        return term

    def _minus_signs(self) -> bool:
        """Read signs, and tell whether they make what follows negative."""
        negative = False
        while self._is("+-"):
            negative ^= self._take().text == "-"
        return negative

    def _product(self) -> Node:
        """Factors with signs of multiplication and division between them, or with none."""
        result = self._factors()
        divisions = 0
        while self._is("*/") or (self.kind == "command" and self.text in _REMAINDERS):
            sign = self._take().text
            factor = self._signed_factors()
            if sign in _REMAINDERS:
                result = Node("mod", (result, factor))
                continue
            if sign == "*":
                # No deeper tree for a longer product.
                result = Node(
                    "mul", (*result.parts, factor) if result.op == "mul" else (result, factor)
                )
                continue
            divisions += 1
            if divisions > MAX_DEPTH:
                raise Unreadable("it is divided too often")
            if is_whole(result) and factor.op == "mul" and is_whole(factor.parts[0]):
                # 1/2x is half of x
                rest = factor.parts[1:]
                result = Node("mul", (Node("div", (result, factor.parts[0])), *rest))
            else:
                result = Node("div", (result, factor))
        return result

    def _signed_factors(self) -> Node:
        negative = self._minus_signs()
        factors = self._factors()
        if negative:
            return Node("neg", (factors,))
        return factors

    def _factors(self) -> Node:
        """Factors that stand side by side."""
        factors = [self._mixed() or self._power()]
        while self._starts_factor():
            factors.append(self._power())
        return _product_of(factors)

    def _starts_factor(self) -> bool:
        if self.kind in ("letter", "roman") or (
            self.kind == "command" and self.text not in _CLOSERS
        ):
            return True
        if self.kind == "number":
            return self._tokens[self._place - 1].kind != "number"
        return self._is("({[" + PI + INFINITY) or (self._is("|") and not self._bars)

    def _mixed(self) -> Node | None:
        r"""A mixed number, `2\frac{1}{2}` or `2 1/2`, or None with nothing read."""
        tokens = self._tokens
        start = self._place
        if self.kind != "number" or not is_whole(tokens[start].node):
            return None
        behind = tokens[start + 1 : start + 4]
        if len(behind) > 1 and behind[0].kind == "command" and behind[0].text == "frac":
            whole = self._take().number
            fraction = self._primary()
            if all(map(is_whole, fraction.parts)):
                return Node("add", (whole, fraction))
        elif _is_fraction(behind) and behind[0].spaced:
            self._place += 4
            fraction = Node("div", (behind[0].number, behind[2].number))
            return Node("add", (tokens[start].number, fraction))
        self._place = start
        return None

    def _power(self) -> Node:
        """A factor with its powers, factorials, degrees and percents."""
        base = self._primary()
        for _ in range(MAX_DEPTH):
            if not self._is("^!%" + DEGREE):
                return base
            mark = self._take().text
            if mark == "^":
                base = Node("pow", (base, self._exponent()))
            elif mark == "!":
                base = Node("factorial", (base,))
            elif mark == "%":
                base = Node("div", (base, number(100)))
            elif self._angle:
                base = Node("div", (Node("mul", (base, Node("name", name="pi"))), number(180)))
        raise Unreadable("it has too many marks")

    def _exponent(self) -> Node:
        self._descend()
        negative = self._minus_signs()
        power = self._primary()
        if self._is("^"):
            self._take()
            power = Node("pow", (power, self._exponent()))
        self._depth -= 1
        if negative:
            return Node("neg", (power,))
        return power

    def _descend(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable("it is too deep")

    def _argument(self) -> Node:
        r"""What `\frac` or `\sqrt` takes: a group, or one digit or letter."""
        if self._is("{"):
            return self._primary()
        if self.kind == "number" and len(self.text) > 1 and self.text.isdigit():
            token = self._tokens[self._place]
            first = token.text[0]
            rest = token.text[1:]
            self._tokens[self._place] = Token("number", rest, False, number(int(rest)))
            return number(int(first))
        return self._primary()

    def _primary(self) -> Node:
        """A number, a name, a group in brackets, or a command with what it takes."""
        self._descend()
        node = self._read_primary(self._take())
        self._depth -= 1
        return node

    def _read_primary(self, token: Token) -> Node:
        if token.kind == "number":
            return token.number
        if token.kind in ("letter", "roman"):
            return self._variable(token.text)
        if token.kind == "command":
            return self._command(token.text)
        if token.text in CONSTANTS:
            return Node("name", name=CONSTANTS[token.text])
        for opening, closing in ("()", "[]", "{}"):
            if token.text == opening:
                bars = self._bars
                self._bars = 0
                inner = self.sum()
                self._expect(closing)
                self._bars = bars
                return inner
        if token.text == "|":
            self._bars += 1
            inner = self.sum()
            self._expect("|")
            self._bars -= 1
            return Node("call", (inner,), name="abs")
        raise Unreadable(f"{token.text} is unknown")

    def _variable(self, letter: str) -> Node:
        """A name with its index and primes; the index may be a word."""
        name = letter
        if self._is("_"):
            self._take()
            if self._is("{"):
                start = self._place
                while not self._is("}"):
                    self._take()
                self._take()
                name += "_" + "".join(
                    token.text for token in self._tokens[start + 1 : self._place - 1]
                )
            else:
                name += "_" + self._take().text
        while self._is("'"):
            name += self._take().text
        return Node("name", name=CONSTANTS.get(name, name))

    def _command(self, name: str) -> Node:
        if name == "frac":
            top = self._argument()
            return Node("div", (top, self._argument()))
        if name == "binom":
            top = self._argument()
            return Node("binomial", (top, self._argument()))
        if name == "sqrt":
            return self._root()
        if name in FUNCTIONS:
            return self._function(name)
        if name in OF_LISTS:
            return self._function_of_list(name)
        if name in ("lfloor", "lceil"):
            inner = self.sum()
            if self.kind != "command" or self._take().text != "r" + name[1:]:
                raise Unreadable(f"{name} is not closed")
            return Node("call", (inner,), name=name[1:])
        if name in GREEK:
            return self._variable(name)
        raise Unreadable(f"{name} is unknown")

    def _root(self) -> Node:
        index = number(2)
        if self._is("["):
            index = self._primary()
        inner = self._primary()
        return Node("root", (inner, index))

    def _function(self, name: str) -> Node:
        r"""A function with its base or power and its argument: `\log_2 8`, `\sin^2 x`, `\tan^{-1}
        2x`."""
        base: Node | None = None
        power: Node | None = None
        while self._is("_^"):
            if self._take().text == "_":
                base = self._argument()
            else:
                power = self._exponent()
        if base is not None and name != "log":
            raise Unreadable(f"{name} has no base")
        self._angle += name in TRIGONOMETRIC or name == "cis"
        if self._is("({["):
            inner = self._primary()
        else:
            inner = self._bare_argument()
        self._angle -= name in TRIGONOMETRIC or name == "cis"
        if power == Node("neg", (number(1),)):
            name = f"arc{name}"
            power = None
        call = Node("call", (inner,) if base is None else (inner, base), name=name)
        if power is None:
            return call
        return Node("pow", (call, power))

    def _function_of_list(self, name: str) -> Node:
        r"""The greatest common divisor and the like, `\gcd(12, 18)`, of any number of formulas."""
        opening = self._take().text
        if opening not in _LISTS:
            raise Unreadable(f"{name} has no list")
        members = self._member()
        while self._is(",;"):
            self._take()
            members += self._member()
        self._expect(_LISTS[opening])
        return Node("call", tuple(sorted(members, key=repr)), name=name)  # order does not matter

    def _member(self) -> list[Node]:
        """One formula of a list, or those that 5,100 stands for: 5 and 100."""
        if self.kind == "number" and "," in self.text:
            return [number(int(part)) for part in self._take().text.split(",")]
        return [self.sum()]

    def _bare_argument(self) -> Node:
        """The factors behind a function that has no brackets, up to the next function."""
        negative = self._minus_signs()
        factors = [self._power()]
        while self._starts_factor() and not self._is("(") and self.text not in FUNCTIONS:
            factors.append(self._power())
        argument = _product_of(factors)
        if negative:
            return Node("neg", (argument,))
        return argument


def _is_fraction(tokens: Sequence[Token]) -> bool:
    """Whether these are a whole number, a slash and a whole number."""
    if len(tokens) != 3:
        return False
    above, slash, below = tokens
    numbers = above.kind == below.kind == "number"
    return numbers and slash.text == "/" and is_whole(above.node) and is_whole(below.node)


def _product_of(factors: list[Node]) -> Node:
    if len(factors) == 1:
        return factors[0]
    return Node("mul", tuple(factors))
