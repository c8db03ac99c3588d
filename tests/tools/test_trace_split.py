"""Where the time of a traced step goes: of events made by hand, and of a step of the tiny model."""

from __future__ import annotations

import json

import pytest
from support.multiproc import run_ranks
from support.tool import functions, run_here
from support.worlds import SHORT, train_body


def event(name, start, seconds, shapes=None):
    return {
        "ph": "X",
        "name": name,
        "ts": start * 1e6,
        "dur": seconds * 1e6,
        "args": {"Input Dims": shapes or []},
    }


def test_of_events_made_by_hand():
    events = [
        event("aten::mm", 0, 1, [[9, 9], [9, 9]]),  # of no phase
        event("update", 10, 20),
        event("aten::mm", 11, 2, [[2, 3], [3, 5]]),
        event("_Attend", 14, 1),
        event("_TokenLogProbs", 16, 4),
        event("aten::addmm_", 17, 3, [[7, 4], [7, 2], [2, 4], [], []]),
        event("ref", 40, 2),
        event("aten::bmm", 40, 1, [[6, 2, 3], [6, 3, 5]]),
    ]
    found = functions("trace_split.py")["split"](events)
    update = found["update"].report(peak=20.0)
    operations = 2 * 2 * 3 * 5 + 2 * 7 * 2 * 4
    assert update == pytest.approx(
        {
            "seconds": 20,
            "products": 5,
            "attention": 1,
            "logits": 1,
            "rest": 13,
            "limit": operations / 20,
            "share_of_limit": operations / 20 / 20,
        }
    )
    assert found["ref"].products == 1 and found["ref"].operations == 2 * 6 * 2 * 3 * 5


def test_of_a_step(tmp_path, capfd):
    run_ranks(
        train_body,
        1,
        "tiny",
        [
            *SHORT,
            "training.profile_steps=[2]",
            f"output_dir={tmp_path}",
            "training.report_interval=0",
        ],
    )
    (trace,) = (tmp_path / "profile" / "step_000002").glob("*.json.gz")
    assert run_here("trace_split.py", str(trace)) == 0
    told = json.loads(capfd.readouterr().out.splitlines()[-1])
    for phase in ("ref", "update"):
        parts = told[phase]
        assert min(parts.values()) > 0, phase
        assert parts["rest"] < parts["seconds"]


def test_without_a_trace(tmp_path, capsys):
    assert run_here("trace_split.py", str(tmp_path / "none")) == 2
    assert "does not exist" in capsys.readouterr().err
