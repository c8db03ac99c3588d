"""The run folder: made fresh for each run, or continued by one that goes on from its checkpoint.

What an earlier run left is moved aside, never overwritten. metrics.jsonl is only ever appended to. A run that was
killed may have recorded steps after its last checkpoint; going on takes these lines off its end, into
logs/superseded.jsonl, since the same steps will be taken and recorded again. Lines before stay byte for byte.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path


def append_line(path: Path, entry: object) -> None:
    """Append a JSON line, whole or not at all. OSError when it cannot be written."""
    with path.open("ab", buffering=0) as file:
        end, rest = file.tell(), memoryview(json.dumps(entry).encode() + b"\n")
        try:
            while rest:
                rest = rest[file.write(rest):]
        except OSError:
            file.truncate(end)
            raise


def check_writable(key: str, path: str) -> list[str]:
    """Return a sentence if the folder that `key` names cannot be made or written."""
    folder = Path(path)
    while not os.path.lexists(folder):  # a link to nowhere counts: nothing can be made in its place
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            return []
    except OSError as error:
        return [f"{key}: {path} cannot be written ({error.strerror} in {folder}); name another folder"]


def start_folder(folder: Path, config: str) -> list[str]:
    """Make the run folder with its config.yaml and logs/; return what should be said about it.

    A folder that holds the metrics of an earlier run is renamed to <folder>.1, .2, ...
    """
    said = []
    if (folder / "metrics.jsonl").exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(aside)
        said.append(f"the earlier run in {folder} is now in {aside}")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    return said


def continue_folder(folder: Path, config: str, step: int) -> list[str]:
    """Make the run folder ready to record step + 1; return what should be said about it."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    taken = [_cut(folder / name, step, folder / "logs" / "superseded.jsonl")
             for name in ("metrics.jsonl", "evaluation.jsonl", "logs/spans.jsonl")]
    for path in (folder / "samples").glob("step_*.parquet"):
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink()
    return [f"{taken[0]} recorded steps after step {step} are taken again (logs/superseded.jsonl)"] if taken[0] else []


def _cut(path: Path, step: int, aside: Path) -> int:
    """Move the lines after those of `step` from the end of a file to that of another; returns their number."""
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        lines = file.readlines()
        kept = 0
        while kept < len(lines) and _step_of(lines[kept]) <= step:
            kept += 1
        if kept < len(lines):
            with aside.open("ab") as other:
                other.writelines(lines[kept:])
            file.truncate(sum(map(len, lines[:kept])))
    return len(lines) - kept


def _step_of(line: bytes) -> float:
    """The step that a line records; a line that was cut off counts as later than all."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
