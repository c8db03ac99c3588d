"""Where metrics go besides metrics.jsonl: real trackers, and ones that fail, hang or have no
room."""

from __future__ import annotations

import errno
import json
import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from support.patience import LONG, wait_until
from support.small_config import load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from r1zero.observe import trackers
from r1zero.observe.trackers import Sinks, open_tracker
from r1zero.preflight.checks import check

ROOT = Path(__file__).resolve().parents[2]


class Good:
    """Remembers its rows."""

    def __init__(self):
        self.rows, self.closed = [], False

    def write(self, step, row):
        self.rows.append((step, row))

    def close(self):
        self.closed = True


class Full(Good):
    """A disk without room."""

    def write(self, step, row):
        raise OSError(errno.ENOSPC, "No space left on device")


class Hanging(Good):
    """A server that never answers, neither to rows nor at the end."""

    def write(self, step, row):
        threading.Event().wait(LONG)


def dead():
    """Weights & Biases without a network exits like this."""
    raise SystemExit("no route to host")


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("r1zero"), "propagate", True)
    caplog.set_level(logging.INFO, logger="r1zero")
    return lambda: [record.getMessage() for record in caplog.records]


def test_no_tracker_stops_or_slows_a_step_and_each_speaks_once(said, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 1.0)
    good = Good()
    all_sinks = Sinks({"hanging": Hanging, "full": Full, "dead": dead, "good": lambda: good})
    began = time.monotonic()
    for step in range(3 * trackers.QUEUE_ROWS):
        all_sinks.put(step, {"loss": float(step)})
        if step % 16 == 0:
            wait_until(lambda step=step: len(good.rows) > step)  # the good one keeps up
    wait_until(lambda: len(good.rows) == 3 * trackers.QUEUE_ROWS)
    all_sinks.close()
    assert time.monotonic() - began < LONG / 2, "nobody waits for the one that hangs"
    assert good.closed and good.rows == [
        (step, {"loss": float(step)}) for step in range(3 * trackers.QUEUE_ROWS)
    ]
    lines = said()
    assert len(lines) == 3, lines
    counts = [
        sum(f"warning: {name}: " in line for line in lines)
        for name in ("good", "full", "hanging", "dead")
    ]
    assert counts == [0, 1, 1, 1]
    assert any("No space left" in line for line in lines) and any(
        "does not answer" in line for line in lines
    )


def test_tensorboard_has_every_metric_and_a_blocked_folder_is_only_said(tmp_path, said):
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "tensorboard").write_text("a file where the folder should be")
    lost = Sinks(
        {"tensorboard": partial(open_tracker, "tensorboard", tmp_path / "blocked", "run", {})}
    )
    lost.put(1, {"reward/mean": 0.5})
    lost.close()
    for steps in ((1, 2, 3), (3, 4)):  # resumed: step 3 is done again
        kept = Sinks({"tensorboard": partial(open_tracker, "tensorboard", tmp_path, "run", {})})
        for step in steps:
            kept.put(step, {"reward/mean": step / 2, "loss": -1.0})
        kept.close()
        time.sleep(1.0)  # event files are read in the order of the second in their names
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [
        (step, step / 2) for step in (1, 2, 3, 4)
    ]
    assert [event.value for event in events.Scalars("loss")] == [-1.0] * 4
    [warning] = [line for line in said() if line.startswith("warning: ")]
    assert warning.startswith("warning: tensorboard: could not be set up: FileExistsError")


SCRIPT = """
import resource, signal, sys
from functools import partial
from pathlib import Path
from r1zero.observe import trackers as sinks
from r1zero.distributed.log import start_logging
from r1zero.distributed.process import end

kind, folder, first, largest_file = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
sinks.CLOSE_SECONDS = float(sys.argv[5])
(folder / "logs").mkdir(parents=True, exist_ok=True)
start_logging(folder / "logs", 0, 1, to_console=False)
tracker = sinks.Sinks({kind: partial(sinks.open_tracker, kind, folder, "my_run", {"seed": 1})})
if largest_file:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
for step in range(first, first + 3):
    tracker.put(step, {"reward/mean": step / 2, "loss": -1.0})
tracker.close()
end(0)
"""


def track(kind, folder, first=1, largest_file=0, waits=LONG, **variables):
    """Send three steps to a real tracker, in a process of its own and with nothing of the user's
    environment, and wait so many seconds for its end; returns what the log says."""
    words = [kind, str(folder), str(first), str(largest_file), str(waits)]
    here = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "WANDB_SILENT": "true",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words],
        env=here | variables,
        capture_output=True,
        text=True,
        timeout=LONG,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [
        line
        for line in (folder / "logs" / "rank_0000.log").read_text().splitlines()
        if "warning" in line
    ]


@pytest.mark.parametrize(
    ("kind", "files", "variables"),
    [
        ("wandb", "wandb/offline-run-*/run-*.wandb", {"WANDB_MODE": "offline"}),
        ("swanlab", "swanlab/run-*/run-*.swanlab", {"SWANLAB_MODE": "offline"}),
        ("trackio", "trackio/r1zero.db", {"TRACKIO_DIR": "{folder}/trackio"}),
    ],
)
def test_real_trackers_take_every_row_and_a_run_that_goes_on_is_one_run_there(
    kind, files, variables, tmp_path
):
    variables = {name: value.format(folder=tmp_path) for name, value in variables.items()}
    for first in (1, 4):
        assert track(kind, tmp_path, first, **variables) == []
    written = sorted(tmp_path.glob(files))
    key = (tmp_path / "logs" / "run_key").read_text()
    if kind == "trackio":
        table = sqlite3.connect(written[0]).execute(
            "SELECT run_name, step, metrics FROM metrics ORDER BY step"
        )
        rows = table.fetchall()
        assert [(name, step, json.loads(row)) for name, step, row in rows] == [
            (f"my_run-{key[:6]}", step, {"reward/mean": step / 2, "loss": -1.0})
            for step in range(1, 7)
        ]
        return
    # Records for `sync`; a run is its key, so the files of both starts go to one run.
    assert len(written) == 2 and all(key in path.name for path in written)
    for path in written:
        assert path.read_bytes().count(b"reward/mean") >= 3


def test_trackers_that_start_together_get_one_key(tmp_path, monkeypatch):
    draw = uuid.uuid4
    # so that they would meet
    monkeypatch.setattr(trackers.uuid, "uuid4", lambda: (time.sleep(0.05), draw())[1])
    with ThreadPoolExecutor(16) as pool:
        keys = set(pool.map(trackers.run_key, [tmp_path] * 64))
    assert len(keys) == 1 and len(keys.pop()) == 21


def test_a_dead_server_or_no_account_is_told_once_and_nothing_waits_for_it(tmp_path):
    dead = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    [line] = track("wandb", tmp_path / "dead", waits=5.0, **dead)
    assert (
        "warning: wandb: does not end; rows are missing there, metrics.jsonl has them all; "
        "training goes on"
    ) in line
    for kind in ("wandb", "swanlab"):
        [line] = track(kind, tmp_path / kind)
        assert f"warning: {kind}: could not be set up: " in line


def test_no_room_for_tensorboard_is_told_once_and_what_was_written_stays(tmp_path):
    assert track("tensorboard", tmp_path) == []
    [line] = track("tensorboard", tmp_path, first=4, largest_file=100)
    assert "warning: tensorboard: OSError(27, 'File too large')" in line
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward/mean")
    assert [(event.step, event.value) for event in events][:3] == [(1, 0.5), (2, 1.0), (3, 1.5)]


def test_unknown_and_missing_trackers_are_refused_before_the_start(home, monkeypatch):
    [sentence] = check(load(home, "training.logger=[tensorbord]"))
    assert "tensorbord is not one of" in sentence and "did you mean tensorboard?" in sentence
    monkeypatch.setitem(trackers.PACKAGES, "swanlab", "package_of_swanlab")  # as if it were missing
    [sentence] = check(load(home, "training.logger=[tensorboard, swanlab]"))
    assert "swanlab is not installed; `pip install package_of_swanlab`" in sentence
