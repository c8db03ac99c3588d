"""The benchmark of a step's overlap, on a small world with every option at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.tool import functions, run_here

from r1zero.types import Batch, Prompt

SMALL = "--prompts 8 --minibatches 2 --shrink 256 --speed 1000 --steps 4".split()


def test_it_prints_seconds_and_waits_of_a_world(tiny, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_here("bench_overlap.py", "--sigma", "0.8", "--variants", "all", *SMALL) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])["sigma_0.8"]["all"]
    assert found["ratio"] == 1.0 and found["seconds"] > 0 and found["tokens_per_second"] > 0
    for role in ("train", "rollout", "ref"):
        assert 0 <= found[f"idle_{role}"] < 1


def test_lengths_come_back_with_their_prompts() -> None:
    """Four fifths of the variance of the logarithm lie between prompts, and the mean is 700."""
    job = functions("bench_overlap.py")["Job"](
        sigma=0.8,
        prompts=2000,
        samples=4,
        minibatches=8,
        shrink=1.0,
        speed=1.0,
        real=False,
        steps=4,
        data=Path(),
    )
    prompts = [Prompt(index, "", np.zeros(0, np.int32), "") for index in range(2000)]
    first = job.lengths(Batch(1, 0, prompts, 4, 1))
    again = job.lengths(Batch(2, 1, prompts, 4, 1))
    assert (first == job.lengths(Batch(1, 0, prompts, 4, 1))).all()
    assert first.max() == job.cap == 2048
    of_prompt = [np.log(lengths).mean(axis=1) for lengths in (first, again)]
    # the mean of 4 has 0.8 between prompts and 0.2 / 4 within; cut lengths vary a little less
    assert np.corrcoef(*of_prompt)[0, 1] == pytest.approx(0.8 / (0.8 + 0.2 / 4), abs=0.02)
    assert np.median(first) == pytest.approx(700 * np.exp(-(0.8**2) / 2), rel=0.05)
