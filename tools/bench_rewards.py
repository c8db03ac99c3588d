#!/usr/bin/env python3
"""Measure how many answers a second one core scores, through the reward executor and its worker.
Prints one JSON line.

    python tools/bench_rewards.py --data math500.parquet

Each right answer is asked for once, so nothing is cached. For each share of right answers a new
worker starts: a right response boxes the right answer, a wrong one the right answer of another row.
Reward executor and worker share one core; the start of the worker is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

sys.path[0] = str(Path(__file__).resolve().parents[1])

from r1zero.reward.config import RewardConfig
from r1zero.reward.executor import RewardExecutor
from r1zero.reward.types import RewardInput
from r1zero.types import Outcome


def cases(golds: list[str], right_share: float, seed: int) -> list[RewardInput]:
    """Return one response to each right answer; exactly a share of them box it."""
    draw = random.Random(seed)
    others = draw.sample(golds, len(golds))
    right = set(draw.sample(range(len(golds)), round(right_share * len(golds))))
    thought = "We look at the equation and find that both sides have the same sign. " * 20
    made = []
    for number, (gold, other) in enumerate(zip(golds, others, strict=True)):
        boxed = gold if number in right else other
        response = f"<think>{thought}</think>\n<answer>The answer is $\\boxed{{{boxed}}}$.</answer>"
        made.append(RewardInput("", response, gold, tokens=300, limit=4096, truncated=False))
    return made


def score_all(responses: list[RewardInput]) -> tuple[float, int, int]:
    """Return the seconds that scoring takes, how many are right, and how many comparisons
    failed."""
    with RewardExecutor(RewardConfig(names=["acc"], weights=[1.0], workers=1)) as executor:
        executor.submit("first", 0, 1, responses[0])  # waits for the start of the worker
        executor.collect(["first"])
        start = time.perf_counter()
        for number, case in enumerate(responses):
            executor.submit(number, 0, 1, case)
        scores = [members[0]["acc"] for members in executor.collect(range(len(responses))).values()]
        seconds = time.perf_counter() - start
    right = sum(score.outcome is Outcome.RIGHT for score in scores)
    return seconds, right, sum(score.outcome.failed for score in scores)


def main() -> None:
    """Read the command line, measure, print."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument(
        "--data", type=Path, required=True, help="parquet with a column ground_truth_answer"
    )
    parser.add_argument(
        "--right", type=float, nargs="+", default=[0.0, 0.5, 1.0], help="right shares"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    column = pq.read_table(arguments.data, columns=["ground_truth_answer"])["ground_truth_answer"]
    golds = list(dict.fromkeys(column.to_pylist()))  # each once
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    result: dict[str, object] = {"distinct_answers": len(golds)}
    for share in arguments.right:
        seconds, right, failed = score_all(cases(golds, share, arguments.seed))
        result[f"right_{share:g}"] = {
            "answers_per_second_per_core": round(len(golds) / seconds, 1),
            "scored_right": right,
            "failed": failed,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
