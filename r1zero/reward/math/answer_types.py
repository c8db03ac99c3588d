r"""The types of answers: numbers, sets, intervals, choices, words, ...

Scalar     5, 3\sqrt{2}\text{ cm}, x = 5, y = 2x + 1
Group      1, 2    (1, 2)    [1, 2)    \{1, 2\}    2:3    (items may be of any kind)
Sets       (-\infty, 1) \cup (2, \infty), \mathbb{R} \setminus \{3\}
Relation   x + y = 1, 1 < x \le 2, x \ne 3
Matrix     \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
Based      52_8
Words      \text{no solution}, Tuesday
"""

from __future__ import annotations

from dataclasses import dataclass

from r1zero.reward.math.tokens import Node
from r1zero.reward.math.units import Unit


@dataclass(frozen=True, slots=True)
class Scalar:
    """A formula, its unit, the x of `x =`; `letters` is the formula with the m of the unit as a
    variable."""

    tree: Node
    unit: Unit = Unit()
    label: str = ""
    letters: Node | None = None


@dataclass(frozen=True, slots=True)
class AnswerGroup:
    """Some answers, and their brackets: "()", "[)", "{}", ":" for a ratio, or "" for none."""

    brackets: str
    items: tuple[Answer, ...]
    joint: str = ","  # between bare parts: ",", AND or OR
    label: str = ""  # of a ratio: the S:T of S:T =
    clock: bool = False  # a ratio that may be a time of day: 3:30

    @property
    def unordered(self) -> bool:
        return self.brackets in ("", "{}")

    @property
    def scalars(self) -> tuple[Scalar, ...] | None:
        """The items, if all of them are numbers or formulas."""
        found = tuple(item for item in self.items if isinstance(item, Scalar))
        if len(found) < len(self.items):
            return None
        return found

    @property
    def names(self) -> list[str]:
        """The names of the values, if each has its own: y = 2, x = 1, but not x_1 = 2, x_2 = 1."""
        labels = [item.label if isinstance(item, Scalar) else "" for item in self.items]
        if len(set(labels)) < len(labels) or "" in labels or "_" in "".join(labels):
            return []
        return labels


@dataclass(frozen=True, slots=True)
class Sets:
    """A union of sets of real numbers, less some others."""

    joined: tuple[Answer, ...]
    removed: tuple[Answer, ...] = ()


@dataclass(frozen=True, slots=True)
class Relation:
    """Formulas with =, <, >, LE, GE or NE between them."""

    sides: tuple[Node, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    rows: tuple[tuple[Answer, ...], ...]


@dataclass(frozen=True, slots=True)
class Based:
    """Digits with the base they are written in."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Words:
    text: str


Answer = Scalar | AnswerGroup | Sets | Relation | Matrix | Based | Words
