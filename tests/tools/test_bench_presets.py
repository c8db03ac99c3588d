"""The tool that trains the tiny job with presets, for two steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tool import functions, run_here


def test_it_prints_the_scores_of_each_preset_and_seed(
    tiny: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--presets", "cispo", "--seeds", "1", "--steps", "2", "--interval", "1"]
    assert run_here("bench_presets.py", *arguments, "reward.workers=1") == 0
    told = capfd.readouterr()
    found = json.loads(told.out)
    assert (found["steps"], found["seeds"], list(found["presets"])) == (2, [1234], ["cispo"])
    scores = found["presets"]["cispo"]
    assert len(scores["accuracy"]) == 1 and 0.3 < scores["accuracy"][0] < 0.9
    assert scores["steps_to_90"] == [None], "two steps do not teach it"
    assert "cispo, seed 1234: " in told.err


def test_a_run_that_fails_is_told(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--presets", "gspo", "--seeds", "1", "algorithm.aggregation=token_mean"]
    assert run_here("bench_presets.py", *arguments) == 1
    told = capfd.readouterr()
    assert json.loads(told.out)["presets"]["gspo"]["accuracy"] == [None]
    assert "gspo, seed 1234: exit code 2" in told.err
    assert "does not go with the loss gspo" in told.err


def test_steps_to_a_goal() -> None:
    first_step = functions("bench_presets.py")["first_step"]
    assert first_step({0: 0.2, 2: 0.89, 4: 0.9, 6: 0.8}, 0.9) == 4
    assert first_step({0: 0.2, 2: 0.89}, 0.9) is None
