"""The benchmark of context parallelism, on two ranks and a short sequence."""

from __future__ import annotations

import json

import pytest
from support.tool import run_here


def test_it_prints_work_memory_and_loss(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cp", "2", "--prompt", "20", "--response", "501"]
    assert run_here("bench_cp.py", *arguments) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["tokens"] == 520 and found["tokens of a rank"] == 260
    assert 1 <= found["busiest rank over mean"] < 1.05
    assert found["loss"] > 0 and found["peak megabytes"] > 0
