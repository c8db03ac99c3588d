#!/usr/bin/env python3
"""Train the tiny job with each preset of configs/algorithm/ and several seeds. Prints one JSON line.

    python tools/bench_presets.py [--presets dapo gspo ...] [--seeds 3] [--steps 40] [key=value ...]

Each run is a world of one rank; --parallel of them run at a time. Other overrides hold for all runs,
behind the preset. By preset, in the order of the seeds: accuracy on the 256 held-out sums after the
last step (pass@1, one answer each at temperature 1), and the first step after which it was 90% or more,
measured every --interval steps; null if it never was. On standard error a line for each run as it ends.
Exit code 1 if a run failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from r1zero.config.schema import CONFIGS

FIRST_SEED = 1234  # the default of training.seed
GOAL = 0.9


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to; without scores if it failed."""

    preset: str
    seed: int
    seconds: float
    accuracy: float | None = None
    steps_to_goal: int | None = None


def main() -> int:
    args = parse()
    seeds = range(FIRST_SEED, FIRST_SEED + args.seeds)
    with tempfile.TemporaryDirectory(prefix="bench_presets_") as folder:

        def run(job: tuple[str, int]) -> Result:
            return train(*job, Path(folder), args)

        with ThreadPoolExecutor(args.parallel) as pool:
            results = list(pool.map(run, itertools.product(args.presets, seeds)))
    found = {}
    for preset in args.presets:
        own = [result for result in results if result.preset == preset]
        found[preset] = {
            "accuracy": [result.accuracy for result in own],
            "steps_to_90": [result.steps_to_goal for result in own],
        }
    print(json.dumps({"steps": args.steps, "seeds": list(seeds), "presets": found}))
    return int(any(result.accuracy is None for result in results))


def train(preset: str, seed: int, folder: Path, args: argparse.Namespace) -> Result:
    """Run one job and read its scores."""
    output = folder / f"{preset}_{seed}"
    command = [
        sys.executable,
        str(ROOT / "r1zero" / "main.py"),
        "--config=tiny",
        f"algorithm={preset}",
        f"training.seed={seed}",
        f"training.train_iters={args.steps}",
        f"training.eval_interval={args.interval}",
        "training.samples_interval=0",
        "training.report_interval=0",
        f"output_dir={output}",
        *args.overrides,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - began
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        code = f"exit code {done.returncode} after {seconds:.0f} s"
        tell(f"{preset}, seed {seed}: {code}: {' / '.join(said[-3:])}")
        return Result(preset, seed, seconds)
    scores = read_scores(output)
    result = Result(preset, seed, seconds, list(scores.values())[-1], first_step(scores, GOAL))
    if result.steps_to_goal is None:
        reached = f"never {GOAL:.0%}"
    else:
        reached = f"{GOAL:.0%} after {result.steps_to_goal} steps"
    tell(f"{preset}, seed {seed}: {result.accuracy:.1%}, {reached}, {seconds:.0f} s")
    return result


def read_scores(output: Path) -> dict[int, float]:
    """Accuracy on held-out problems by step."""
    lines = (output / "evaluation.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return {entry["step"]: entry["pass@1"] for entry in entries}


def first_step(scores: dict[int, float], goal: float) -> int | None:
    """The first step after which the score was at least `goal`."""
    return next((step for step, score in scores.items() if score >= goal), None)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    shipped = sorted(path.stem for path in (CONFIGS / "algorithm").glob("*.yaml"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", choices=shipped, default=shipped)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps", type=int, default=40, help="of a run")
    parser.add_argument("--interval", type=int, default=2, help="steps between evaluations")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    args, overrides = parser.parse_known_args()
    args.overrides = overrides
    return args


if __name__ == "__main__":
    sys.exit(main())
