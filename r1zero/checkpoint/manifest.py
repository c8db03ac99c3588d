"""The manifest of a checkpoint: its files with sizes and SHA-256, written last.

A folder without the list was never finished; one whose files differ from it is damaged. The sums
are those of `sha256sum`, so anybody can check them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from r1zero.errors import BadInput
from r1zero.run_folder.durable import sync_folder, write_synced

NAME = "complete.json"
CHUNK = 1 << 22  # bytes read at a time


@dataclass(frozen=True, slots=True)
class File:
    """One file of a checkpoint."""

    size: int  # bytes
    sha256: str


def describe(path: Path) -> File:
    """Read a file and return its size and sum. OSError when it cannot be read."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return File(size, digest.hexdigest())


def write(folder: Path, files: Mapping[str, File]) -> None:
    """Mark `folder` complete with these files, which must be on disk already."""
    text = json.dumps(
        {"files": {name: asdict(file) for name, file in sorted(files.items())}}, indent=1
    )
    write_synced(folder / NAME, text + "\n")
    sync_folder(folder)


def read(folder: Path) -> dict[str, File]:
    """The files that a checkpoint was saved with. BadInput when there is no such list, or it is
    damaged."""
    try:
        entries = json.loads((folder / NAME).read_text())["files"]
        return {name: File(**entry) for name, entry in entries.items()}
    except FileNotFoundError:
        raise BadInput(
            f"{folder} has no {NAME}: it was never saved to its end, or not by this program"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{folder / NAME} is damaged ({error})") from None


def check_sizes(folder: Path) -> None:
    """Compare the files' sizes with the list. BadInput naming the first that differs."""
    for name, file in read(folder).items():
        path = folder / name
        if not path.is_file():
            raise BadInput(f"{path} is missing")
        if path.stat().st_size != file.size:
            raise BadInput(
                f"{path} has {path.stat().st_size} bytes, but {file.size} were saved: damaged or "
                "cut off"
            )


def check_sums(folder: Path, names: Iterable[str]) -> None:
    """Compare these files with their sums. BadInput naming the first that differs."""
    files = read(folder)
    for name in names:
        try:
            intact = describe(folder / name) == files[name]
        except OSError as error:
            raise BadInput(f"{folder / name} cannot be read: {error.strerror}") from None
        if not intact:
            raise BadInput(
                f"{folder / name} differs from what was saved: its SHA-256 is another one"
            )
