"""The benchmark of context parallelism, on two ranks and a short sequence."""

from __future__ import annotations

import json

import pytest
from support.tool import run_here


def test_it_prints_work_memory_and_loss(capfd: pytest.CaptureFixture[str]) -> None:
    found = {}
    for cp in (1, 2):
        arguments = ["--cp", str(cp), "--prompt", "20", "--response", "501"]
        assert run_here("bench_cp.py", *arguments) == 0
        found[cp] = json.loads(capfd.readouterr().out.splitlines()[-1])
        assert found[cp]["tokens"] == 520 and found[cp]["tokens of a rank"] == 520 / cp
        assert 1 <= found[cp]["busiest rank over mean"] < 1.05
        assert found[cp]["peak megabytes"] > 0
    assert found[2]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
