"""Tell whether two runs computed the same numbers: compare their metrics.jsonl bit for bit.

    python tools/compare_metrics.py RUN RUN      run folders, or metrics.jsonl files; before and after

What depends on the clock or the machine is left out: keys under time/, throughput/ and memory/, and
keys that end with per_second. Everything else must be the same, with the same keys in the same
steps. Exit code 0 when it is, 1 with the first differences by step and key when not, 2 for bad
input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

Metrics = dict[str, float]

TIMING_PREFIXES = ("time/", "throughput/", "memory/")
TIMING_SUFFIX = "per_second"
SHOWN = 20  # differences that are listed


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two runs; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="run folder or metrics.jsonl")
    parser.add_argument("after", type=Path, help="the same of the other run")
    parser.add_argument(
        "--new-keys",
        action="store_true",
        help="keys that only the second run has are no difference",
    )
    args = parser.parse_args(arguments)
    try:
        before = read_metrics(args.before)
        after = read_metrics(args.after)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    found = list(differences(before, after, args.new_keys))
    for line in found[:SHOWN]:
        print(line)
    if len(found) > SHOWN:
        print(f"and {len(found) - SHOWN} more")
    if found:
        return 1
    numbers = sum(len(row) for row in before.values())
    print(f"{len(before)} steps, {numbers} numbers: the same")
    return 0


def read_metrics(path: Path) -> dict[int, Metrics]:
    """The numbers of each step that do not depend on the clock or the machine.

    ValueError for a line that is no JSON object with a step, and when there is no line.
    """
    if path.is_dir():
        path = path / "metrics.jsonl"
    steps: dict[int, Metrics] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{number} is no JSON object with a step") from None
        if step in steps:
            raise ValueError(f"{path}:{number} holds step {step} a second time")
        steps[step] = {key: value for key, value in row.items() if not is_timing(key)}
    if not steps:
        raise ValueError(f"{path} holds no steps")
    return steps


def is_timing(key: str) -> bool:
    """Whether the numbers of this key depend on the clock or the machine."""
    return key.startswith(TIMING_PREFIXES) or key.endswith(TIMING_SUFFIX)


def differences(
    before: dict[int, Metrics], after: dict[int, Metrics], new_keys: bool = False
) -> Iterator[str]:
    """One line for each number that differs, by step and key."""
    for step in sorted(before.keys() | after.keys()):
        if step not in after:
            yield f"step {step}: only in the first"
        elif step not in before:
            yield f"step {step}: only in the second"
        else:
            yield from _of_step(step, before[step], after[step], new_keys)


def _of_step(step: int, before: Metrics, after: Metrics, new_keys: bool) -> Iterator[str]:
    for key in sorted(before.keys() | after.keys()):
        if key not in after:
            yield f"step {step}: {key}: only in the first"
        elif key not in before:
            if not new_keys:
                yield f"step {step}: {key}: only in the second"
        elif repr(before[key]) != repr(after[key]):  # repr: NaN is NaN, and no digit is lost
            yield f"step {step}: {key}: {before[key]!r} is now {after[key]!r}"


if __name__ == "__main__":
    sys.exit(main())
