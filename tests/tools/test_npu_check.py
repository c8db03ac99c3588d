"""tools/npu_check.py on the stand-in for torch_npu: every item passes, and fails when the thing that
it looks at is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.npu_worlds import environment
from support.patience import LONG

ROOT = Path(__file__).resolve().parents[2]
ITEMS = ("versions", "float64", "environment", "operators", "draws")
# Item, ranks, a fault of npu_items.FAULTS, and a part of the sentence of FAIL.
BROKEN = [
    ("versions", 1, "versions are judged", "mindspeed is not installed; clone MindSpeed's branch"),
    ("versions", 1, "MindSpeed cannot be imported", "ImportError: No module named 'einops'"),
    ("float64", 2, "MindSpeed's sum", "the sum of float64 over gloo is"),
    ("environment", 1, "a queue without graphs", "TASK_QUEUE_ENABLE=2 makes torch_npu refuse"),
    ("operators", 1, "no mask", "training attention, head size 64 is off by"),
    ("operators", 1, "half a gradient", "training attention, head size 64 is off by"),
    ("operators", 1, "lengths one short", "decode attention, head size 64 is off by"),
    ("operators", 1, "the sign of the sine", "rotary, head size 64 is off by"),
    ("draws", 2, "parts of an all_gather swapped", "TP 2, whole distribution: "),
]


def npu_check(*arguments: str, **variables: str) -> tuple[int, str, str]:
    """Run the tool; exit code, standard output, standard error."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "npu_check.py"), *arguments],
        text=True,
        capture_output=True,
        timeout=LONG,
        env={**os.environ, **variables},
    )
    return done.returncode, done.stdout, done.stderr


def test_without_an_npu_it_says_so_in_one_sentence() -> None:
    code, out, err = npu_check()
    assert code == 2
    assert out == ""
    [sentence] = err.splitlines()
    assert "no NPU that torch_npu sees" in sentence and "set_env.sh" in sentence


def test_all_items_pass_on_the_stand_in(npu, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code, out, err = npu_check(
        *("--devices", "4", "--size", "small", "--out", str(report)), **environment()
    )
    assert code == 0, out + err
    found = json.loads(report.read_text())
    verdicts = {name: outcome["verdict"] for name, outcome in found["items"].items()}
    assert verdicts == dict.fromkeys(ITEMS, "PASS")
    for name, outcome in found["items"].items():
        assert f"{name:12} PASS" in out and outcome["line"] in out
        assert outcome["values"], f"{name} has no figures"
    assert f"{len(ITEMS)} PASS, 0 FAIL, 0 SKIP" in out


@pytest.mark.parametrize(("item", "ranks", "fault", "sentence"), BROKEN)
def test_an_item_fails_when_its_thing_is_broken(
    npu, item: str, ranks: int, fault: str, sentence: str
) -> None:
    with pytest.raises(AssertionError) as failed:
        npu.run("npu_check_item", ranks, item, fault)
    assert "CheckFailed: " in str(failed.value)
    assert sentence in str(failed.value)


@pytest.mark.parametrize(("item", "ranks"), [("operators", 1), ("draws", 2)])
def test_the_same_item_unbroken_passes(npu, item: str, ranks: int) -> None:
    assert all(npu.run("npu_check_item", ranks, item, ""))
