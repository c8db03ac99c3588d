"""Megatron's indexed datasets (.bin/.idx): sequences of numbers, and where they begin.

    .bin  the numbers of all sequences, back to back
    .idx  little endian: magic (9 bytes), version (uint64), code of the number type (uint8),
          sequences N (uint64), boundaries D + 1 (uint64), lengths (int32 [N]), offsets in bytes (int64 [N]),
          boundaries (int64 [D + 1])

Document d holds the sequences [boundaries[d], boundaries[d + 1]), of which there may be none. Read
and written here without Megatron, so that data can be made and checked on any machine; the tests
hold both directions to megatron-core's IndexedDataset.
"""

from __future__ import annotations

import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from r1zero.errors import BadInput

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_TYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_INT32 = 4
MAKE_AGAIN = "make it again with tools/preprocess_data.py"


@dataclass(frozen=True, slots=True)
class Indexed:
    """An indexed dataset of whole numbers, by documents."""

    path: Path  # of the .bin file
    values: np.ndarray  # [numbers], mapped from the file
    bounds: np.ndarray  # int64 [documents + 1], into values

    def __len__(self) -> int:
        """Return the number of documents, empty ones included."""
        return len(self.bounds) - 1

    def __getitem__(self, document: int) -> np.ndarray:
        """Return a copy of the numbers of a document, int32."""
        return self.values[self.bounds[document] : self.bounds[document + 1]].astype(np.int32)


def index_path(stem: Path) -> Path:
    return stem.with_name(stem.name + ".idx")


def values_path(stem: Path) -> Path:
    return stem.with_name(stem.name + ".bin")


def read_indexed(stem: Path) -> Indexed:
    """Open the pair `stem`.bin and .idx. BadInput when one is missing, damaged or of another
    kind."""
    path = index_path(stem)
    data = values_path(stem)
    try:
        index = path.read_bytes()
        size = data.stat().st_size
    except OSError as error:
        raise BadInput(f"{error.filename} cannot be read: {error.strerror}; {MAKE_AGAIN}") from None
    if len(index) < _HEADER.size or not index.startswith(_MAGIC):
        raise BadInput(f"{path} is not the index of a .bin file; {MAKE_AGAIN}")
    _, version, code, sequences, boundaries = _HEADER.unpack_from(index)
    if version != _VERSION or code not in _TYPES:
        raise BadInput(
            f"{path} has version {version} and number type {code}; known are version {_VERSION} "
            f"and types 1 to {max(_TYPES)}; {MAKE_AGAIN}"
        )
    kind = np.dtype(_TYPES[code]).newbyteorder("<")
    if kind.kind == "f":
        raise BadInput(
            f"{path} says that the numbers are {kind.name}, but token ids are whole; {MAKE_AGAIN}"
        )
    wanted = _HEADER.size + 12 * sequences + 8 * boundaries
    if len(index) != wanted:
        raise BadInput(
            f"{path} has {len(index)} bytes, but its header describes {wanted}: damaged or cut "
            f"off; {MAKE_AGAIN}"
        )
    lengths = np.frombuffer(index, "<i4", sequences, _HEADER.size)
    offsets = np.frombuffer(index, "<i8", sequences, _HEADER.size + 4 * sequences)
    documents = np.frombuffer(index, "<i8", boundaries, _HEADER.size + 12 * sequences)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if not (
        np.array_equal(offsets, starts[:-1] * kind.itemsize)
        and (lengths >= 0).all()
        and _ascend(documents, sequences)
    ):
        raise BadInput(
            f"{path}: its lengths, offsets and documents contradict each other: damaged; "
            f"{MAKE_AGAIN}"
        )
    if size != starts[-1] * kind.itemsize:
        raise BadInput(
            f"{data} has {size} bytes, but its index describes {starts[-1] * kind.itemsize}: "
            f"damaged or cut off; {MAKE_AGAIN}"
        )
    values: np.ndarray = np.empty(0, kind)
    if size:
        values = np.memmap(data, kind, "r")
    return Indexed(data, values, starts[documents])


def _ascend(documents: np.ndarray, sequences: int) -> bool:
    """Whether the boundaries ascend from 0 to the number of sequences."""
    return (
        len(documents) > 0
        and documents[0] == 0
        and documents[-1] == sequences
        and bool((np.diff(documents) >= 0).all())
    )


def check_writable(prefix: Path) -> None:
    """Make the folder of a file or prefix. BadInput when it cannot be made or written."""
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=prefix.parent):
            pass
    except OSError as error:
        raise BadInput(
            f"{prefix.parent} cannot be written: {error.strerror}; name another"
        ) from None


class IndexedWriter:
    """Writes indexed datasets of int32 that belong together; they get their names at the end,
    complete.

    Use as a context manager. Until its end only files named *.partial-<process> are there.
    """

    def __init__(self, stems: list[Path]) -> None:
        self._stems = stems
        self._files = {stem: _partial(values_path(stem)).open("wb") for stem in stems}
        self._lengths: dict[Path, list[int]] = {stem: [] for stem in stems}
        self._documents: dict[Path, list[int]] = {stem: [0] for stem in stems}

    def add(self, sequences: list[np.ndarray] | None) -> None:
        """Add a document of one sequence to each dataset, in the order of the stems; None adds
        empty ones."""
        if sequences is not None:
            for stem, sequence in zip(self._stems, sequences, strict=True):
                self._files[stem].write(np.ascontiguousarray(sequence, "<i4").data)
                self._lengths[stem].append(len(sequence))
        for stem in self._stems:
            self._documents[stem].append(len(self._lengths[stem]))

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()
        if kind is None:
            self._publish()
        else:
            for stem in self._stems:
                _partial(values_path(stem)).unlink()

    def _publish(self) -> None:
        """Give the files their names. Old indices go first and new ones come last, so that at no
        moment an index stands beside the values of another run."""
        for stem in self._stems:
            _partial(index_path(stem)).write_bytes(
                _index(self._lengths[stem], self._documents[stem])
            )
        for stem in self._stems:
            index_path(stem).unlink(missing_ok=True)
        for path in (*map(values_path, self._stems), *map(index_path, self._stems)):
            with _partial(path).open("rb+") as file:
                # a crash of the machine must not leave a name without content
                os.fsync(file.fileno())
            os.replace(_partial(path), path)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial-{os.getpid()}")


def _index(lengths: list[int], documents: list[int]) -> bytes:
    """Return the content of the .idx file."""
    sizes = np.asarray(lengths, "<i4")
    offsets = np.concatenate([[0], np.cumsum(sizes[:-1], dtype=np.int64)])[: len(sizes)] * 4
    header = _HEADER.pack(_MAGIC, _VERSION, _INT32, len(lengths), len(documents))
    return (
        header
        + sizes.tobytes()
        + offsets.astype("<i8").tobytes()
        + np.asarray(documents, "<i8").tobytes()
    )
