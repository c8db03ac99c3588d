"""The rows of one file, whatever its kind, and the names of its columns.

A file is read as what it plainly is: texts may be compressed, begin with a byte order mark, or
separate columns by semicolons. What has no plain meaning is one sentence about the file.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1zero.data.files import COMPRESSED, KINDS, kind_of
from r1zero.data.json_rows import Json, read_json_rows
from r1zero.data.rows import Row, Shape, UnreadableRow, numbered
from r1zero.errors import BadInput

_NO_DATA = {
    b"version https://git-lfs": "a pointer of Git LFS, no data: `git lfs pull` gets that",
    b"<!doctype html": "a web page, not the data: download the file itself",
    b"<html": "a web page, not the data: download the file itself",
}
_PACKED = {  # in small letters
    b"\x1f\x8b": ".gz",
    b"bzh": ".bz2",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\x04\x22m\x18": ".lz4",
}
_BYTE_ORDER = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_WIDEST = 2**31 - 1  # characters of a field; the csv module's own limit is 128 Ki


@dataclass(frozen=True, slots=True)
class Table:
    """One file: the shape of its rows, and the rows, with the named top-level columns at least."""

    shape: Shape
    rows: Callable[[Sequence[str]], Iterable[Row]]


def open_table(path: Path, held_out: bool, notes: list[str]) -> Table:
    """Open a file of any known kind.

    In a JSON file with splits, `held_out` says which are read; `notes` hears of the others.
    BadInput when it is missing, of an unknown kind, or damaged; its rows may raise it, too.
    """
    if not path.is_file():
        raise BadInput(
            f"{path} does not exist; name a {', '.join(KINDS)} file, or a folder of such files"
        )
    kind = kind_of(path)
    if kind not in KINDS:
        raise BadInput(f"{path} is of an unknown kind; name a file that ends in {', '.join(KINDS)}")
    if path.suffix.lower() in COMPRESSED and kind in (".parquet", ".arrow"):
        raise BadInput(f"{path}: only texts are read compressed; unpack it first")
    with _told(path):
        _refuse_other_things(path)
        table = _open(path, kind, held_out, notes)
    return Table(table.shape, lambda columns: _guarded(path, table.rows(columns)))


def _open(path: Path, kind: str, held_out: bool, notes: list[str]) -> Table:
    if kind == ".parquet":
        return _parquet(path)
    if kind == ".arrow":
        return _arrow(path)
    if kind in (".csv", ".tsv"):
        return _csv(path, "\t" if kind == ".tsv" else _separator(path))
    found: Json = read_json_rows(path, lambda: _open_text(path), kind == ".jsonl", held_out, notes)
    return Table(found.shape, lambda columns: found.rows())


def _refuse_other_things(path: Path) -> None:
    """Name what often lies where the data should be."""
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if kind_of(path) not in (".parquet", ".arrow") and path.suffix.lower() not in COMPRESSED:
        for mark, suffix in _PACKED.items():
            if start.startswith(mark):
                raise BadInput(f"{path} is compressed; name it {path.name}{suffix}, or unpack it")
    for mark, what in _NO_DATA.items():
        if start.startswith(mark):
            raise BadInput(f"{path} is {what}")


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what the system and libraries say about a file into a BadInput."""
    try:
        yield
    except UnicodeError:
        if kind_of(path) in (".parquet", ".arrow"):
            raise BadInput(f"{path} holds texts that are none: damaged; copy it again") from None
        raise BadInput(
            f"{path} is not UTF-8 text; convert it, such as with `iconv -f GB18030 -t UTF-8`"
        ) from None
    except (OSError, EOFError, pa.ArrowException, csv.Error) as error:
        raise BadInput(
            f"{path} cannot be read as a {kind_of(path)} file: {str(error).rstrip('.')}; copy it "
            "again, or see to its permissions"
        ) from None


def _guarded(path: Path, rows: Iterable[Row]) -> Iterator[Row]:
    with _told(path):
        yield from rows


# -- columns --------------------------------------------------------------------------------------


def _parquet(path: Path) -> Table:
    def rows(columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=list(columns)):
                yield from batch.to_pylist()

    return Table(_schema_shape(pq.read_schema(path)), lambda columns: numbered(rows(columns)))


def _arrow(path: Path) -> Table:
    """Read an Arrow stream, which `save_to_disk` of Hugging Face datasets writes, or file."""

    def rows(columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        with pa.memory_map(str(path)) as source:
            for batch in _batches(_open_arrow(source)):
                yield from batch.select(list(columns)).to_pylist()

    with pa.memory_map(str(path)) as source:
        shape = _schema_shape(_open_arrow(source).schema)
    return Table(shape, lambda columns: numbered(rows(columns)))


def _open_arrow(source: pa.NativeFile) -> pa.RecordBatchStreamReader | pa.RecordBatchFileReader:
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source)


def _batches(
    reader: pa.RecordBatchStreamReader | pa.RecordBatchFileReader,
) -> Iterable[pa.RecordBatch]:
    if isinstance(reader, pa.RecordBatchFileReader):
        return map(reader.get_batch, range(reader.num_record_batches))
    return reader


def _schema_shape(fields: pa.Schema | pa.StructType) -> Shape:
    return {
        each.name: _schema_shape(each.type) if pa.types.is_struct(each.type) else None
        for each in fields
    }


# -- texts ----------------------------------------------------------------------------------------


def _open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    """Open a text, unpacked; it is UTF-8 unless it begins with the byte order mark of UTF-16."""
    with pa.input_stream(str(path)) as source:
        encoding = _BYTE_ORDER.get(source.read(2), "utf-8-sig")
    return io.TextIOWrapper(pa.input_stream(str(path)), encoding=encoding, newline=newline)


def _csv(path: Path, separator: str) -> Table:
    def records() -> Iterator[list[str]]:
        csv.field_size_limit(_WIDEST)
        with _open_text(path, newline="") as file:
            yield from filter(None, csv.reader(file, delimiter=separator))

    def rows() -> Iterator[dict[str, str] | UnreadableRow]:
        lines = records()
        next(lines, None)  # the header
        for record in lines:
            if len(record) == len(header):
                yield dict(zip(header, record, strict=True))
            else:
                yield UnreadableRow(f"it has {len(record)} fields, but the header {len(header)}")

    header = [name.strip() for name in next(records(), [])]
    return Table(dict.fromkeys(header), lambda columns: numbered(rows()))


def _separator(path: Path) -> str:
    """Return what separates the names in the first line: a comma, or what may stand for it."""
    with _open_text(path) as file:
        header = next(filter(str.strip, file), "")
    return max(",;\t", key=re.sub('"[^"]*"', "", header).count)
