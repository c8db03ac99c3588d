"""The rows of a JSON text in any layout: a list, an object a line, splits, or columns.

The name does not decide which it is: files called .json often hold JSON lines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from r1zero.data.rows import Row, Shape, UnreadableRow, Values, numbered
from r1zero.data.splits import choose, shown
from r1zero.errors import BadInput

_LOOKED_AT = 100  # first records, whose keys are the columns


@dataclass(frozen=True, slots=True)
class Json:
    """The shape of the rows, and the rows."""

    shape: Shape
    rows: Callable[[], Iterable[Row]]


def read_json_rows(
    path: Path,
    open_text: Callable[[], TextIO],
    prefer_lines: bool,
    held_out: bool,
    notes: list[str],
) -> Json:
    """Find the rows in the text; with `prefer_lines`, what is no document is told line by line.

    Of splits, that of training is read, or else (`held_out`) the other one; `notes` hears of what
    is left out. BadInput when there are no rows to be found.
    """
    if _is_lines(open_text):
        return _lines(open_text)
    with open_text() as file:
        text = file.read()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # malformed; too many digits; nested too deeply
        if prefer_lines or not text.strip():
            return _lines(open_text)
        raise BadInput(
            f"{path} is neither a JSON list of objects nor one object a line: {_fault(error)}"
        ) from None
    if prefer_lines and not isinstance(content, (list, dict)):
        return _lines(open_text)
    records = _records(path, content, held_out, notes)
    if prefer_lines and records == [content] and "\n" not in text.strip():
        return _lines(open_text)
    return Json(_shape(records), lambda: numbered(map(_as_row, records)))


def _is_lines(open_text: Callable[[], TextIO]) -> bool:
    """Whether the first line is an object by itself, and not all there is."""
    with open_text() as file:
        filled = filter(str.strip, file)
        first = next(filled, "")
        second = next(filled, "")
    return bool(second) and isinstance(_parsed(first), dict)


def _lines(open_text: Callable[[], TextIO]) -> Json:
    def rows() -> Iterator[Row]:
        with open_text() as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", _as_row(_parsed(line))

    return Json(_shape(row for _, row in rows()), rows)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return UnreadableRow(_fault(error, text))


def _fault(error: Exception, text: str = "") -> str:
    """Say in the user's words what is wrong with a JSON text."""
    if isinstance(error, RecursionError):
        return "its brackets are nested too deep"
    if not isinstance(error, json.JSONDecodeError):
        return "it holds a number of thousands of digits"
    if "\0" in text:
        return "it holds NUL bytes, as a copy that was cut off leaves; copy the file again"
    return f"not valid JSON: {error}"


def _as_row(value: Any) -> Values:
    if isinstance(value, (dict, UnreadableRow)):
        return value
    return UnreadableRow(f"found {type(value).__name__}, not a JSON object")


def _records(path: Path, content: Any, held_out: bool, notes: list[str]) -> list[Any]:
    """Find the rows in a document: a list, one of several lists, columns, or a single row."""
    if isinstance(content, list):
        return content
    if not isinstance(content, dict) or not content:
        if content == {}:
            held = "an empty object"
        else:
            held = type(content).__name__
        raise BadInput(
            f"{path} must hold a JSON list of objects or one object a line, but holds {held}"
        )
    columns = _as_lists(content)
    if columns:
        rows = zip(*columns.values(), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]
    tables = {
        name: value
        for name, value in content.items()
        if _holds_objects(value) and not _is_chat(value)
    }
    if not tables:
        return [content]
    kept = choose(str(path), tables, held_out, notes)
    if len(kept) > 1:
        raise BadInput(f"{path} holds several lists, {shown(kept)}; keep one of them in it")
    return tables[kept[0]]


def _as_lists(content: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the columns, each a list, of an object of columns; {} for other objects.

    `DataFrame.to_json` writes each as an object: {"question": {"0": "..."}}.
    """
    columns = content
    if all(isinstance(value, dict) for value in content.values()):
        if len({tuple(value) for value in content.values()}) > 1:
            return {}
        columns = {name: list(value.values()) for name, value in content.items()}
    values = list(columns.values())
    if not all(isinstance(value, list) for value in values):
        return {}
    if len({len(value) for value in values}) > 1:
        return {}
    if all(map(_holds_objects, values)) or any(map(_is_chat, values)):
        return {}
    return columns


def _holds_objects(value: Any) -> bool:
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(each, dict) for each in value)


def _is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, which are no rows."""
    return _holds_objects(value) and all({"role", "content"} <= set(each) for each in value)


def _shape(records: Iterable[Any]) -> Shape:
    """Return the keys of the first records; some writers leave out those whose value is null."""
    shape: Shape = {}
    for record in islice(records, _LOOKED_AT):
        if isinstance(record, dict):
            _add(shape, record)
    return shape


def _add(shape: Shape, record: dict[str, Any]) -> None:
    for name, value in record.items():
        if isinstance(value, dict) and value:
            shape[name] = shape.get(name) or {}
            _add(shape[name], value)
        else:
            shape.setdefault(name, None)
