"""The trained model in a run folder, and the mark that tells of which step it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

MODEL = "model"  # the folder of the trained model
ADAPTER = "adapter"  # the folder of its adapters by themselves, if adapters were trained
MARK = "r1zero.json"  # in it


def mark(step: int) -> str:
    """What is written beside an exported model."""
    return json.dumps({"step": step}) + "\n"


def exported_step(folder: Path) -> int | None:
    """The step whose weights a run has exported to `folder`; None when no run did."""
    try:
        return int(json.loads((folder / MARK).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def in_the_way(folder: Path, source: str | Path, may_replace: bool) -> str | None:
    """What lies where the trained model belongs; with `may_replace` a model of this run is fine.

    `source` is the folder of the model that training starts from.
    """
    if os.path.realpath(folder) == os.path.realpath(source):
        return f"{folder} is the model to start from, and the trained one belongs there; move it"
    if not os.path.lexists(folder) or (may_replace and exported_step(folder) is not None):
        return None
    if not folder.is_dir():
        return f"{folder} is in the way of the trained model, which is a folder; move it"
    if any(folder.iterdir()):
        return f"{folder} is not of this run, and the trained model belongs there; move it"
    return None
