"""The tool that measures engines side by side, on a small case."""

from __future__ import annotations

import json
import subprocess
import sys

from support.patience import LONG
from support.tool import TOOLS

SMALL = "--model tiny --prompts 2 --samples 2 --prompt-len 8 --length 4 --dtype fp32 --repeats 1"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOLS / "bench_engines.py", *SMALL.split(), *arguments],
        text=True,
        timeout=LONG,
        capture_output=True,
    )


def test_it_prints_the_speed_of_each_and_whether_samples_are_the_same() -> None:
    own = f"{TOOLS.parent / 'examples' / 'engine_transformers.py'}:TransformersEngine"
    done = bench("--engines", "native", own)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["tokens"] == 16
    for name in ("native", own):
        assert figures[name]["tokens_per_second"] > 0
        assert figures[name]["same_samples"] == 1.0


def test_an_engine_that_is_not_there_is_told_at_once() -> None:
    done = bench("--engines", "nativ")
    assert done.returncode == 2
    assert done.stderr == (
        "bench_engines.py: --engines: nativ is not one of native, vllm; did you mean native?\n"
    )
