"""tools/compare_metrics.py: the same numbers or not, apart from what the clock says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tool import run_here

STEP = {"loss": 0.1, "kl": 0.0, "mismatch/max": float("nan"), "tokens/response": 12}
TIMING = {
    "time/step": 1.0,
    "memory/peak_gigabytes/train": 2.0,
    "throughput/tokens_per_second": 3.0,
    "publish/gigabytes_per_second": 4.0,
}


def write(folder: Path, *steps: dict[str, Any]) -> str:
    folder.mkdir()
    rows = [json.dumps({"step": number, **step}) for number, step in enumerate(steps, start=1)]
    (folder / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
    return str(folder)


def compare(tmp_path: Path, before: list[dict], after: list[dict], *flags: str) -> int:
    return run_here(
        "compare_metrics.py",
        write(tmp_path / "before", *before),
        write(tmp_path / "after", *after),
        *flags,
    )


def test_numbers_of_the_clock_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slower = {key: 2 * value for key, value in TIMING.items()}
    assert compare(tmp_path, [STEP | TIMING, STEP], [STEP | slower, STEP]) == 0
    assert capsys.readouterr().out == "2 steps, 10 numbers: the same\n"


@pytest.mark.parametrize(
    ("after", "line"),
    [
        ([STEP, STEP | {"loss": 0.1 + 2**-56}], "step 2: loss: 0.1 is now 0.10000000000000002"),
        ([STEP, STEP | {"kl": -0.0}], "step 2: kl: 0.0 is now -0.0"),
        ([STEP, STEP | {"mismatch/max": 0.0}], "step 2: mismatch/max: nan is now 0.0"),
        ([STEP, STEP | {"new": 1}], "step 2: new: only in the second"),
        ([STEP, {"loss": 0.1, "kl": 0.0, "mismatch/max": 0.5}], "tokens/response: only in the f"),
        ([STEP], "step 2: only in the first"),
        ([STEP, STEP, STEP], "step 3: only in the second"),
    ],
)
def test_any_other_difference_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], after: list[dict], line: str
) -> None:
    assert compare(tmp_path, [STEP, STEP], after) == 1
    assert line in capsys.readouterr().out


def test_new_metrics_may_be_allowed_but_none_may_go(tmp_path: Path) -> None:
    more = STEP | {"new": 1}
    assert compare(tmp_path, [STEP], [more], "--new-keys") == 0
    for folder in ("before", "after"):
        (tmp_path / folder / "metrics.jsonl").unlink()
        (tmp_path / folder).rmdir()
    assert compare(tmp_path, [more], [STEP], "--new-keys") == 1


def test_a_long_list_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(tmp_path, [STEP] * 30, [STEP | {"loss": 0.2}] * 30) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    assert lines[-1] == "and 10 more"


@pytest.mark.parametrize("text", ["", "no JSON\n", "[1]\n", '{"loss": 1}\n', '{"step": 1}\n' * 2])
def test_what_is_no_metrics_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    good = write(tmp_path / "good", STEP)
    bad = tmp_path / "metrics.jsonl"
    bad.write_text(text)
    assert run_here("compare_metrics.py", good, str(bad)) == 2
    assert str(bad) in capsys.readouterr().err
    assert run_here("compare_metrics.py", good, str(tmp_path / "nowhere")) == 2
