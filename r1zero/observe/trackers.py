"""Experiment trackers (TensorBoard, W&B, SwanLab, trackio); none may stop or slow a step.

A tracker runs in a thread of its own behind a bounded queue, from its set-up on: a server that
hangs fills the queue, after which rows are dropped; one that raises loses that row. Either is said
once. The run folder has every row in any case.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from r1zero.errors import nearest
from r1zero.run_folder.owner import plain

QUEUE_ROWS = 64  # rows that wait for a slow tracker
CLOSE_SECONDS = 10.0  # that the end of a run waits for all trackers together
PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "swanlab": "swanlab",
    "trackio": "trackio",
}

log = logging.getLogger("r1zero")
_drawing = threading.Lock()

MetricRow = Mapping[str, float]


class Tracker(Protocol):
    """What takes the metrics of a step."""

    def write(self, step: int, row: MetricRow) -> None:
        """Take one row."""

    def close(self) -> None:
        """Bring everything to where it belongs."""


def check_loggers(names: Sequence[str], installed: bool = True) -> list[str]:
    """Return a sentence for each name that is unknown or, if it must be `installed`, whose package
    is not."""
    problems = [
        f"training.logger: {name} is not one of {', '.join(PACKAGES)}{nearest(name, PACKAGES)}"
        for name in names
        if name not in PACKAGES
    ]
    needed = [name for name in names if installed and name in PACKAGES]
    return problems + [
        f"training.logger: {name} is not installed; `pip install {PACKAGES[name]}`, or take it out"
        for name in needed
        if importlib.util.find_spec(PACKAGES[name]) is None
    ]


def run_key(folder: Path) -> str:
    """What tells the run of this folder from all others: 21 letters and digits, drawn once."""
    path = folder / "logs" / "run_key"
    with _drawing:  # trackers are set up side by side
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            fresh = path.with_suffix(".partial")
            fresh.write_text(uuid.uuid4().hex[:21])  # as long as SwanLab wants it
            os.replace(fresh, path)
        return path.read_text()


def open_tracker(kind: str, folder: Path, name: str, config: Mapping[str, Any]) -> Tracker:
    """Set a tracker up for this run."""
    if kind == "tensorboard":
        return TensorBoard(folder / "tensorboard")
    return Service(kind, folder, name, config)


class TensorBoard:
    """Event files in the run folder. Of steps that a resumed run does again, the later rows
    count."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(exist_ok=True)  # before the first row, so that trouble is told at once
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._open = partial(SummaryWriter, str(folder))

    def write(self, step: int, row: MetricRow) -> None:
        if self._writer is None:
            self._folder.stat()  # it would make what is missing, wherever that is
            self._writer = self._open(purge_step=step)
        for key, value in row.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Service:
    """Weights & Biases, SwanLab or trackio: they share init, log and finish. Their own variables
    set the rest.

    A run that goes on after a stop goes on there, too.
    """

    def __init__(self, package: str, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self._module = importlib.import_module(package)
        key = run_key(folder)
        folder = Path(plain(folder))
        where: dict[str, dict[str, Any]] = {
            "wandb": {"id": key, "name": name, "dir": str(folder), "allow_val_change": True},
            "swanlab": {"id": key, "experiment_name": name, "logdir": str(folder / "swanlab")},
            "trackio": {"name": f"{name}-{key[:6]}"},
        }  # which has no other key
        self._module.init(project="r1zero", config=dict(config), resume="allow", **where[package])

    def write(self, step: int, row: MetricRow) -> None:
        self._module.log(dict(row), step=step)

    def close(self) -> None:
        self._module.finish()


class Sink:
    """A tracker at arm's length."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name = name
        self._rows: queue.Queue[tuple[int, MetricRow] | None] = queue.Queue(QUEUE_ROWS)
        self._said = False
        self._thread = threading.Thread(
            target=self._work, args=(make,), name=f"sink-{name}", daemon=True
        )
        self._thread.start()

    def put(self, step: int, row: MetricRow) -> None:
        """Hand a row over; it is dropped when too many wait. Returns at once."""
        try:
            self._rows.put_nowait((step, row))
        except queue.Full:
            self._say("does not answer")

    def end(self) -> None:
        """Let the tracker finish after the rows that it has."""
        with contextlib.suppress(queue.Full):  # nobody takes rows any more
            self._rows.put_nowait(None)

    def join(self, deadline: float) -> None:
        """Wait for that until `deadline`, on the monotonic clock; then leave it behind."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._say("does not end")

    def _work(self, make: Callable[[], Tracker]) -> None:
        try:
            tracker = make()
        except BaseException as error:  # noqa: BLE001
            # foreign code in our process; some raise SystemExit
            self._say(f"could not be set up: {error!r}")
            return
        while (entry := self._rows.get()) is not None:
            try:
                tracker.write(*entry)
            except BaseException as error:  # noqa: BLE001
                self._say(repr(error))
        try:
            tracker.close()
        except BaseException as error:  # noqa: BLE001
            self._say(repr(error))

    def _say(self, trouble: str) -> None:
        if not self._said:
            self._said = True
            log.warning(
                (
                    "warning: %s: %s; rows are missing there, metrics.jsonl has them all; training "
                    "goes on"
                ),
                self.name,
                trouble,
            )


class Sinks:
    """All trackers of a run."""

    def __init__(self, makers: Mapping[str, Callable[[], Tracker]]) -> None:
        self._sinks = [Sink(name, make) for name, make in makers.items()]

    def put(self, step: int, row: MetricRow) -> None:
        for sink in self._sinks:
            sink.put(step, row)

    def close(self) -> None:
        """Let all finish, side by side; takes CLOSE_SECONDS at most."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for sink in self._sinks:
            sink.end()
        for sink in self._sinks:
            sink.join(deadline)
