"""Reading problems from .parquet, .jsonl and .json files; a bad row is named by file and number."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from r1zero.errors import BadInput
from r1zero.sentences import nearest

_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of the data: what is asked, the right answer, and a system text ("" = the template's)."""

    question: str
    answer: str
    system: str


def read_problems(path: str | Path, map_keys: dict[str, str]) -> list[Problem]:
    """Read the problems of a .parquet, .jsonl or .json file (a list of objects), in the file's order.

    A folder stands for its files of one of these kinds, in the order of their names.

    `map_keys` names the columns of prompt, query, response and system; "" means that there is none. The
    question is prompt, newline, query, without the empty ones. BadInput when file, row or column is bad.
    """
    path = Path(path)
    columns = {part: map_keys.get(part, "") for part in ("prompt", "query", "response", "system")}
    for part in ("prompt", "response"):
        if not columns[part]:
            raise BadInput(f"map_keys.{part} is empty; it must name the column of {path} with the {part}")
    wanted = list(dict.fromkeys(column for column in columns.values() if column))
    problems = [_problem(f"{file}, {place}", row, columns) for file in data_files(path)
                for place, row in _rows(file, wanted)]
    if not problems:
        raise BadInput(f"{path} has no rows; data_path must name a file with at least one problem")
    return problems


def read_tags(path: str | Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Read those of the columns `names` that a raw data set has: a text for each row, in their order."""
    rows = [row for file in data_files(Path(path)) for _, row in _rows(file, _present(file, names))]
    return {name: [str(row.get(name)) for row in rows] for name in names if any(name in row for row in rows)}


def _present(path: Path, names: Sequence[str]) -> list[str]:
    """Return the columns of a parquet file among `names`; rows of other files come whole."""
    return [name for name in names if name in pq.read_schema(path).names] if path.suffix == ".parquet" else []


def _problem(place: str, row: dict, columns: dict[str, str]) -> Problem:
    """Check one row. `place` names its file and number."""
    def text(part: str, required: bool, numbers: bool = False) -> str:
        column = columns[part]
        value = row.get(column) if column else None
        if isinstance(value, float) and math.isnan(value):
            value = None
        if numbers and isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
            value = str(value)
        if value is None and not required:
            return ""
        if not isinstance(value, str):
            found = "is missing or null" if value is None else f"is {value!r:.80}, not a text"
            raise BadInput(f"{place}: column {column!r} {found}; correct or remove the row")
        if required and not value.strip():
            raise BadInput(f"{place}: column {column!r} is empty; correct or remove the row")
        if not value.isprintable() and _HALF.search(value):
            raise BadInput(f"{place}: column {column!r} has half of a surrogate pair, "
                           f"{_HALF.search(value)[0]!a}, which is no character; correct or remove the row")
        return value

    parts = text("prompt", required=True), text("query", required=False)
    return Problem("\n".join(filter(None, parts)), text("response", required=True, numbers=True),
                   text("system", required=False))


def data_files(path: Path) -> list[Path]:
    """Return the data files that a path stands for. BadInput for a folder with none or several kinds."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in _READERS)
    kinds = sorted({file.suffix for file in files})
    if len(kinds) != 1:
        raise BadInput(f"{path} holds {' and '.join(kinds) or 'no data'} files; data_path must name a "
                       f"file, or a folder with files of one of the kinds {', '.join(_READERS)}")
    return files


def _rows(path: Path, columns: list[str]) -> Iterator[tuple[str, dict]]:
    """Yield ("row 1", {column: value}) for each row; for JSONL the number is that of the line."""
    if not path.is_file():
        raise BadInput(f"{path} does not exist; data_path must name a .parquet, .jsonl or .json file")
    if path.suffix not in _READERS:
        raise BadInput(f"{path} is of an unknown kind; data_path must name a file that ends in "
                       + ", ".join(_READERS))
    try:
        yield from _READERS[path.suffix](path, columns)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise BadInput(f"{path} cannot be read as a {path.suffix} file: {error}") from None


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[tuple[str, dict]]:
    with pq.ParquetFile(path) as file:
        _require(path, columns, file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row


def _jsonl_rows(path: Path, columns: list[str]) -> Iterator[tuple[str, dict]]:
    with path.open(encoding="utf-8") as lines:
        records = ((f"line {number}", parse_json(f"{path}, line {number}", line))
                   for number, line in enumerate(lines, 1) if line.strip())
        yield from _objects(path, columns, records)


def _json_rows(path: Path, columns: list[str]) -> Iterator[tuple[str, dict]]:
    records = parse_json(str(path), path.read_text(encoding="utf-8"))
    if not isinstance(records, list):
        raise BadInput(f"{path} must hold a JSON list of objects; for one object a line name it .jsonl")
    numbered = ((f"row {number}", record) for number, record in enumerate(records, 1))
    yield from _objects(path, columns, numbered)


def _objects(path: Path, columns: list[str],
             records: Iterator[tuple[str, object]]) -> Iterator[tuple[str, dict]]:
    """Pass JSON objects on. The first one must have all columns; a later lack is the fault of its row."""
    for count, (place, record) in enumerate(records):
        if not isinstance(record, dict):
            raise BadInput(f"{path}, {place}: found {type(record).__name__}, not a JSON object; "
                           "correct or remove the row")
        if count == 0:
            _require(path, columns, list(record))
        yield place, record


def _require(path: Path, columns: list[str], present: list[str]) -> None:
    missing = [column for column in columns if column not in present]
    if missing:
        raise BadInput(f"{path} has no column {missing[0]!r}; it has {', '.join(present) or 'none'}"
                       f"{nearest(missing[0], present)}; set training.map_keys to the right ones")


_READERS = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows, ".json": _json_rows}


def parse_json(place: str, text: str) -> object:
    """Parse JSON text found at `place`. BadInput naming it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # malformed; a number of too many digits; nested too deeply
        raise BadInput(f"{place}: not valid JSON: {error}") from None
