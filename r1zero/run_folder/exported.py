"""The trained model in a run folder, and the mark that tells of which step it is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL = "model"  # the folder of the trained model
ADAPTER = "adapter"  # the folder of its adapters by themselves, if adapters were trained
EXPORTS = "exports"  # the folder of the models on the way
MARK = "r1zero.json"  # in each of them
_NAME = re.compile(r"step_(\d{6,})")


def mark(step: int, scores: Mapping[str, float] | None = None) -> str:
    """What is written beside an exported model: its step, and its scores if it was evaluated."""
    content: dict[str, Any] = {"step": step}
    if scores is not None:
        content["scores"] = dict(scores)
    return json.dumps(content) + "\n"


def export_path(run: Path, step: int) -> Path:
    """Where the model of a step on the way goes in this run folder."""
    return run / EXPORTS / f"step_{step:06d}"


def exports(run: Path) -> dict[int, dict[str, float] | None]:
    """The scores of each model on the way that is whole, by its step; None: not evaluated."""
    found = {}
    for path in (run / EXPORTS).glob("step_*"):
        name = _NAME.fullmatch(path.name)
        if name and exported_step(path) == int(name[1]):
            found[int(name[1])] = json.loads((path / MARK).read_text()).get("scores")
    return found


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
