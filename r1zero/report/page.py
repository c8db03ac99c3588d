"""report.html: a run, or several compared, as one offline page.

The page is assets/page.html with the style sheets, the scripts and the data put in. Charts are
drawn by uPlot (assets/uPlot.LICENSE). The data is JSON; samples and spans in it are packed step by
step (`sample_selection.py`).
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1zero.errors import BadInput
from r1zero.report.history import RunHistory
from r1zero.report.sample_selection import STEP_BYTES, TEXT_LIMIT
from r1zero.run_folder.owner import plain

log = logging.getLogger("r1zero")

ASSETS = Path(__file__).parent / "assets"
STYLES = ("uPlot.min.css", "page.css")
SCRIPTS = (
    "base.js",
    "specs.js",
    "axis.js",
    "charts.js",
    "timeline.js",
    "answers.js",
    "samples.js",
    "prompts.js",
    "figures.js",
    "page.js",
)
PACKED_BYTES = 4_000_000  # of all runs together; the rest of the page is below 1 MB for 1,000 steps
SHARE_OF_TIME = 0.01  # of a run's time that writing its report may take
MOST_FILES = 16  # sample files read at a time, so that even after a resume no writing takes long


def write_report(path: Path, histories: Sequence[RunHistory]) -> None:
    """Write the page of these runs to `path`, whole or not at all."""
    page = render([history.as_json() for history in histories])
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def open_runs(folders: Sequence[Path]) -> list[RunHistory]:
    """Read these run folders, which share the room in the page. BadInput for a folder that is no
    run."""
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            raise BadInput(
                f"{folder} is no run folder: metrics.jsonl is missing; give a run's output_dir"
            )
    histories = [RunHistory(folder, PACKED_BYTES // len(folders)) for folder in folders]
    for history in histories:
        history.read()
    return histories


def render(runs: Sequence[dict[str, Any]]) -> str:
    """Return the page as text."""
    limits = {"stepBytes": STEP_BYTES, "textLimit": TEXT_LIMIT}
    data = {"runs": runs, "written": time.time(), "limits": limits}
    parts = {
        "title": _escaped(" / ".join(run["folder"] for run in runs)),
        "styles": "\n".join(_asset(name) for name in STYLES),
        "library": _asset("uPlot.iife.min.js"),
        "scripts": "\n".join(_asset(name) for name in SCRIPTS),
        # Pure ASCII without "<": no text of a model can end the script element or reorder the page.
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    page = _asset("page.html")
    pieces = page.split("@@")  # text, name, text, name, ..., text
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


class LiveReport:
    """The report of a running run, kept by the controller. Trouble is a warning, never an end.

    It is written every `interval` steps (0: only at the end), but not before the last writing has
    become a small share of the time since: a run with short steps gets it less often.
    """

    def __init__(self, folder: Path, interval: int) -> None:
        self._history = RunHistory(folder, PACKED_BYTES)
        self._path = folder / "report.html"
        self._interval = interval
        self._not_before = 0.0  # on the monotonic clock

    def after_step(self, step: int) -> None:
        """Write it if it is due."""
        if self._interval and step % self._interval == 0 and time.monotonic() >= self._not_before:
            self._write(MOST_FILES)

    def finish(self) -> None:
        """Write it with everything."""
        self._write(None)

    def _write(self, most_files: int | None) -> None:
        began = time.monotonic()
        try:
            self._history.read(most_files)
            write_report(self._path, [self._history])
        except Exception as error:
            # nothing that a report can run into is worth the run; told, with its cause in the log
            log.warning(
                "warning: %s was not written: %s; training goes on", plain(self._path), plain(error)
            )
            log.info("cause", exc_info=True)  # into the log file only
        ended = time.monotonic()
        self._not_before = ended + (ended - began) / SHARE_OF_TIME
