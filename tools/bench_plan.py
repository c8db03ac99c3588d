"""Measure how long a rank plans the publication of large models, and in how much memory.

    python tools/bench_plan.py [--case NAME ...] [--senders 2] [--bucket-megabytes 64]

One process for each case. Prints one JSON line a case: seconds of the processor and peak memory of
the whole plan, the list of tensors not counted; pieces of it and of one rollout rank's part; process
groups of all and of that rank; gigabytes (bf16) that it gets and that the busiest source gives.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
sys.path.insert(1, str(Path(__file__).resolve().parent))

from plan_cases import CASES

from r1zero.weight_sync.plan import SENDING_REPLICAS, plan

ELEMENT = 2  # bytes of a bf16 number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--senders", type=int, default=SENDING_REPLICAS)
    parser.add_argument("--bucket-megabytes", type=int, default=64)
    args = parser.parse_args()
    fork = multiprocessing.get_context("fork")
    for name in args.case:
        child = fork.Process(target=measure, args=(name, args.senders, args.bucket_megabytes))
        child.start()
        child.join()
        if child.exitcode:
            return 1
    return 0


def measure(name: str, senders: int, megabytes: int) -> None:
    """Plan one case and print what it took."""
    case = CASES[name]
    tensors = case.tensors()
    before = peak_megabytes()
    start = time.process_time()
    laid = plan(
        tensors, case.num_layers, case.train, case.rollout, ELEMENT, megabytes * 2**20, senders
    )
    seconds = time.process_time() - start
    peak = peak_megabytes() - before
    receiver = case.rollout.first
    start = time.process_time()
    part = laid.part_of(receiver)
    buckets = list(part.buckets())
    part_seconds = time.process_time() - start
    given = {route.source: 0 for route in laid.routes}
    for source in given:
        given[source] = laid.sent(source) * ELEMENT
    figures = {
        "case": name,
        "senders": senders,
        "seconds": round(seconds, 3),
        "peak_megabytes": round(peak, 1),
        "pieces": sum(len(route.cuts) for route in laid.routes),
        "part_seconds": round(part_seconds, 3),
        "part_pieces": sum(len(bucket.pieces) for bucket in buckets),
        "part_buckets": len(buckets),
        "groups": len(laid.groups()),
        "groups_of_a_rollout_rank": len(part.groups()),
        "received_gigabytes": round(laid.received(receiver) * ELEMENT / 1e9, 2),
        "most_sent_gigabytes": round(max(given.values()) / 1e9, 2),
    }
    print(json.dumps(figures), flush=True)


def peak_megabytes() -> float:
    """The most memory that this process had at a time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
