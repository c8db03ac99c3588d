"""Reading the problems of a data set; a bad row is named by file and number, a bad file as such."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1zero.data.bad_rows import BadRow, NoAnswer, Tally
from r1zero.data.files import data_files
from r1zero.data.layout import PARTS, ColumnLayout
from r1zero.data.row_reader import Problem, read_row
from r1zero.data.rows import Shape, Values, has, names, top_level
from r1zero.data.tables import open_table
from r1zero.errors import BadInput, nearest

_SHOWN = 20  # columns in a sentence


@dataclass(slots=True)
class ProblemSet:
    """What a data set holds: a problem for each row in order, None for one that is left out.

    `notes` are sentences about what was chosen and left out.
    """

    rows: list[Problem | None] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[Problem]:
        """All rows but those that are left out."""
        return [problem for problem in self.rows if problem is not None]


def read_problems(path: str | Path, layout: ColumnLayout) -> ProblemSet:
    """Read the problems of a file, or of those files that a folder stands for, in order.

    Rows that say that they have no answer are left out, and bad ones, if the layout says so.
    BadInput when a file, a row or a column is bad, or no row is left.
    """
    for part in ("prompt", "response"):
        if not layout.columns.get(part):
            raise BadInput(
                f"{layout.columns_key}.{part} is empty; it must name the column of "
                f"{path} with the {part}"
            )
    sources = data_files(path, layout.held_out)
    found = ProblemSet(notes=sources.notes)
    tally = Tally(str(path), layout)
    for file in sources.files:
        table = open_table(file, layout.held_out, found.notes)
        columns = _columns(file, table.shape, layout, found.notes)
        read = [column for column in (*columns.values(), *layout.kept) if column]
        wanted = [top_level(table.shape, column) for column in read]
        for place, values in table.rows(list(dict.fromkeys(wanted))):
            problem = None
            try:
                problem = read_row(values, columns, layout, tally)
            except BadRow as fault:
                tally.bad(f"{file}, {place}", fault)
            except NoAnswer as word:
                tally.without_answer(str(word))
            found.rows.append(problem)
    found.notes += tally.conclude(len(found.rows))
    return found


def _columns(file: Path, shape: Shape, layout: ColumnLayout, notes: list[str]) -> dict[str, str]:
    """Return the column of each part in this file. BadInput when there is none of that name."""
    columns = {part: layout.columns.get(part, "") for part in PARTS}
    for part, column in columns.items():
        if not column or not shape or has(shape, column):  # a file without rows has no shape
            continue
        if part == "system" and layout.system_optional:
            columns[part] = ""
            notes.append(
                f"{file} has no column {column!r}: its problems get the template's system text"
            )
            continue
        raise BadInput(
            f"{file} has no column {column!r}; {_present(shape, column)}; set "
            f"{layout.columns_key} to the right ones"
        )
    for column, function in layout.kept.items():
        if shape and not has(shape, column):
            raise BadInput(
                f"{file} has no column {column!r}, which the reward function {function} sees; "
                f"{_present(shape, column)}"
            )
    return columns


def _present(shape: Shape, column: str) -> str:
    """Say which columns there are, and which of them may be meant."""
    present = names(shape)
    more = ""
    if len(present) > _SHOWN:
        more = f" and {len(present) - _SHOWN} more"
    return f"it has {', '.join(present[:_SHOWN])}{more}{nearest(column, present)}"


def read_tags(path: str | Path, columns: Sequence[str]) -> dict[str, list[str]]:
    """Read those of the `columns` that a held-out data set has: a text for each row, in order."""
    rows: list[Values] = []
    present: set[str] = set()
    for file in data_files(path, held_out=True).files:
        table = open_table(file, held_out=True, notes=[])
        here = [column for column in columns if column in table.shape]
        present.update(here)
        rows += [values for _, values in table.rows(here or list(table.shape)[:1])]
    result: dict[str, list[str]] = {}
    for column in columns:
        if column in present:
            result[column] = [_tag(values, column) for values in rows]
    return result


def _tag(values: Values, column: str) -> str:
    return str(values.get(column) if isinstance(values, dict) else None)


def parse_json(place: str, text: str) -> Any:
    """Parse JSON text found at `place`. BadInput naming it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # malformed; too many digits; nested too deeply
        raise BadInput(f"{place}: not valid JSON: {error}") from None
