"""A row of a data file, before anything is asked of it, and the shape of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class UnreadableRow:
    """Stands for a row that cannot be read; says why."""

    why: str


Values = dict[str, Any] | UnreadableRow
Row = tuple[str, Values]  # its place in the file, such as "line 3", and its values by column
Shape = dict[str, Any]  # names of columns, and the shape of structs in them; None for all else


def numbered(rows: Iterable[Values]) -> Iterator[Row]:
    """Name rows by their number, from 1."""
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def names(shape: Shape, before: str = "") -> list[str]:
    """Return all names in a shape, those inside structs with dots: reward_model.ground_truth."""
    found = []
    for name, inside in shape.items():
        found += names(inside, f"{before}{name}.") if inside else [before + name]
    return found


def has(shape: Shape, column: str) -> bool:
    """Whether rows may have a column, or one behind dots; what is no struct may hold anything."""
    if column in shape:
        return True
    head, dot, rest = column.partition(".")
    if not dot or head not in shape:
        return False
    return shape[head] is None or has(shape[head], rest)


def top_level(shape: Shape, column: str) -> str:
    """Return the top-level column in which a column is found."""
    if column in shape:
        return column
    return column.partition(".")[0]
