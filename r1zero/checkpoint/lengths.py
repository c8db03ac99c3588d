"""The file of lengths in a checkpoint: what `data/batches.py` plans the next batches from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

NAME = "expected_lengths.safetensors"


def write(folder: Path, state: Mapping[str, np.ndarray]) -> None:
    """Write the state into a checkpoint. OSError when that fails."""
    save_file(dict(state), folder / NAME)


def read(folder: Path) -> dict[str, np.ndarray] | None:
    """The state in a checkpoint; None in one that was saved before there was this file."""
    path = folder / NAME
    if not path.is_file():
        return None
    return load_file(path)
