"""The tool that measures latent decoding, on a small case."""

from __future__ import annotations

import json

import pytest
from support.tool import run_here


def test_it_prints_both_ways_and_what_a_token_takes_in_the_cache(
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ["--rows", "2", "--tokens", "65", "--heads", "2", "--repeats", "1"]
    assert run_here("bench_latent_decode.py", *words) == 0
    figures = json.loads(capfd.readouterr().out)
    assert figures["latent_s"] > 0 and figures["expanded_s"] > 0
    assert figures["cached_bytes"] == 4 * (512 + 64)
    assert figures["expanded_bytes"] == 4 * 2 * (192 + 128)
