"""The tool that counts how samples travel, on a small world."""

from __future__ import annotations

import json

import pytest
from support.tool import run_here


def test_each_sample_is_counted_once_on_its_way_to_train(capfd: pytest.CaptureFixture[str]) -> None:
    sizes = ["--prompts", "8", "--group", "4", "--tokens", "2000", "--parts", "2"]
    ranks = ["--train", "2", "--rollout", "2", "--ref", "1"]
    assert run_here("bench_control_plane.py", *sizes, *ranks) == 0
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert figures["samples"] == 32 and 32_000 < figures["tokens"] < 96_000
    of_samples = 12 * figures["tokens"]  # token, log-prob, reference log-prob
    taken = 2 * figures["bytes_mean_of_train_ranks"]["received"]
    assert of_samples < taken < 1.1 * of_samples
    assert figures["bytes_sent_most"] > of_samples, "all go through the one ref rank"
