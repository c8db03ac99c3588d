"""Files that are on disk when a call returns (fsync), whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_synced(path: Path, text: str) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_synced(path: Path, text: str) -> None:
    """Write a file in place of another, whole or not at all, whatever happens."""
    partial = path.with_name(f".{path.name}.partial")
    write_synced(partial, text)
    os.replace(partial, path)
    sync_folder(path.parent)


def sync(path: Path) -> None:
    """Wait until a file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
