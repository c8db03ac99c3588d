"""The tool that measures plans, on its smallest case."""

from __future__ import annotations

import json

import pytest
from support.tool import functions, run_here


def test_it_prints_what_a_plan_takes(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_here("bench_plan.py", "--case", "7B, 8 TP2PP4 -> 6 TP2") == 0
    figures = json.loads(capfd.readouterr().out)
    assert (figures["groups"], figures["groups_of_a_rollout_rank"]) == (8, 4)
    assert figures["received_gigabytes"] == 7.62  # half of 7.6 billion parameters of 2 bytes
    assert figures["part_pieces"] == figures["pieces"] / 2


def test_experts_are_in_the_list_one_by_one() -> None:
    known = functions("known_models.py")
    few = known["deepseek_v3"](4)
    many = known["deepseek_v3"](6)
    assert len(many) - len(few) == 2 * 2 * (known["LAYERS"] - known["DENSE_LAYERS"])
    names = [tensor.name for tensor in many]
    assert len(set(names)) == len(names)
