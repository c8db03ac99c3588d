"""The run folder: made fresh for each run, or continued by one that goes on from its checkpoint.

What an earlier run left is moved aside, never overwritten. metrics.jsonl is only ever appended to.
A run that was killed may have recorded steps after its last checkpoint; going on takes these lines
off its end, into logs/superseded.jsonl, since the same steps will be taken and recorded again.
Lines before stay byte for byte.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from r1zero.run_folder import samples
from r1zero.run_folder.owner import FOLDER as OWNER

EARLIER = ".earlier"  # where an earlier run is gathered before it gets a folder of its own


def append_line(path: Path, entry: object) -> None:
    """Append a JSON line, whole or not at all. OSError when it cannot be written."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        rest = memoryview(json.dumps(entry).encode() + b"\n")
        try:
            while rest:
                rest = rest[file.write(rest) :]
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
        return [
            f"{key}: {path} cannot be written ({error.strerror} in {folder}); name another folder"
        ]


def holds_run(folder: Path) -> bool:
    """Whether an earlier run lies in a folder, be it one whose moving aside was interrupted."""
    return (folder / "metrics.jsonl").exists() or (folder / EARLIER).exists()


def aside_of(folder: Path) -> Path:
    """The path that, with a number behind it, an earlier run gets: beside the folder, not a
    link."""
    if folder.is_symlink() or folder.name == "..":
        return Path(os.path.realpath(folder))
    return folder


def check_aside(key: str, folder: Path) -> list[str]:
    """Return a sentence if the earlier run in a folder could not be moved aside."""
    beside = aside_of(folder)
    try:
        with tempfile.TemporaryDirectory(dir=beside.parent) as made:
            if os.stat(made).st_dev == os.stat(folder).st_dev:
                return []
            reason = "another disk begins there"
    except OSError as error:
        reason = f"{error.strerror} in {beside.parent}"
    return [
        f"{key}: the earlier run in {folder} cannot be moved aside, to {beside}.1 ({reason}); "
        "name another folder, such as one in it"
    ]


def start_folder(folder: Path, config: str) -> list[str]:
    """Make the run folder with its config.yaml and logs/; return what should be said about it.

    An earlier run there is moved to <folder>.1, .2, ... OSError when that fails.
    """
    said = []
    if holds_run(folder):
        said.append(f"the earlier run in {folder} is now in {_set_aside(folder)}")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    return said


def _set_aside(folder: Path) -> Path:
    """Move what is in the folder to a new one beside it, at once and whole; returns that.

    The folder itself stays: it may be a link, and it holds the claim of this run. First all is
    gathered inside; if that is interrupted, the next start does the rest.
    """
    gathered = folder / EARLIER
    gathered.mkdir(exist_ok=True)
    for entry in list(folder.iterdir()):
        if entry.name not in (EARLIER, OWNER):
            entry.rename(gathered / entry.name)
    beside = aside_of(folder)
    number = 1
    while True:
        aside = beside.with_name(f"{beside.name}.{number}")
        try:
            aside.mkdir()
        except FileExistsError:
            number += 1
            continue
        return gathered.rename(aside)


def continue_folder(folder: Path, config: str, step: int) -> list[str]:
    """Make the run folder ready to record step + 1; return what should be said about it."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    taken = [
        _cut(folder / name, step, folder / "logs" / "superseded.jsonl")
        for name in ("metrics.jsonl", "evaluation.jsonl", "logs/spans.jsonl")
    ]
    samples.drop_after(folder, step)
    if taken[0]:
        return [
            f"{taken[0]} recorded steps after step {step} are taken again (logs/superseded.jsonl)"
        ]
    return []


def _cut(path: Path, step: int, aside: Path) -> int:
    """Move the lines after those of `step` from the end of a file to that of another; returns their
    number."""
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
