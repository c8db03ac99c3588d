#!/usr/bin/env python3
"""Compare our verdicts with those of math-verify on the right answers of data sets. Prints one JSON
line.

    python tools/compare_graders.py math500.parquet gsm8k_test.parquet [--limit 500] [--show]

Each right answer is held against itself, against honest respellings of itself, and against the
right answer of another row. math-verify is called as its README does. --show lists the pairs on
which the two differ, on stderr.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
from math_verify import parse, verify

sys.path[0] = str(Path(__file__).resolve().parents[1])

from r1zero.reward.math.grade import same

_FRACTION = re.compile(r"-?\\d?frac\{(\d+)\}\{(\d+)\}")
_BARE_NUMBER = re.compile(r"-?[\d.]+")


def _as_decimal(gold: str) -> str | None:
    match = _FRACTION.fullmatch(gold)
    if match is None or 10**6 % int(match[2]):
        return None
    return f"{'-' * gold.startswith('-')}{int(match[1]) / int(match[2]):.6f}".rstrip("0").rstrip(
        "."
    )


def _as_slash(gold: str) -> str | None:
    match = _FRACTION.fullmatch(gold)
    return match and f"{'-' * gold.startswith('-')}{match[1]}/{match[2]}"


def _with_left_right(gold: str) -> str | None:
    if "(" not in gold or re.search(r"\\left|[][]", gold):
        return None
    return gold.replace("(", r"\left(").replace(")", r"\right)")


def _with_spaces(gold: str) -> str | None:
    if re.search(r"\\text|\\begin|\d,|\{,\}|\$|^-", gold):
        return None
    return re.sub(r"([-+=,])", r" \1 ", gold)


RESPELLINGS: dict[str, Callable[[str], str | None]] = {  # None where a respelling does not apply
    "itself": lambda gold: gold,
    "dfrac": lambda gold: gold.replace(r"\frac", r"\dfrac") if r"\frac" in gold else None,
    "frac": lambda gold: gold.replace(r"\dfrac", r"\frac") if r"\dfrac" in gold else None,
    "decimal": _as_decimal,
    "slash": _as_slash,
    "left right": _with_left_right,
    "spaces": _with_spaces,
    "name": lambda gold: f"x={gold}" if _BARE_NUMBER.fullmatch(gold) else None,
    "unit": lambda gold: gold + r"\text{ cm}" if _BARE_NUMBER.fullmatch(gold) else None,
    "point": lambda gold: f"{gold}.0" if gold.lstrip("-").isdigit() else None,
    "text": lambda gold: rf"\text{{{gold}}}" if gold.isalpha() else None,
}


def pairs(golds: list[str], seed: int) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, right answer, given answer)."""
    others = random.Random(seed).sample(golds, len(golds))
    for gold, other in zip(golds, others, strict=True):
        for kind, respell in RESPELLINGS.items():
            given = respell(gold)
            if given is not None:
                yield kind, gold, given
        yield "another", gold, other


def theirs(gold: str, given: str) -> bool:
    """Return math-verify's verdict."""
    return verify(parse(f"${gold}$"), parse(rf"$\boxed{{{given}}}$"))


def main() -> None:
    """Read the command line, compare, print."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument(
        "data", nargs="+", type=Path, help="parquet files with a column ground_truth_answer"
    )
    parser.add_argument("--limit", type=int, help="rows of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true")
    arguments = parser.parse_args()
    asked: Counter[str] = Counter()
    agreed: Counter[str] = Counter()
    for path in arguments.data:
        column = pq.read_table(path, columns=["ground_truth_answer"])[
            "ground_truth_answer"
        ].to_pylist()
        for kind, gold, given in pairs(column[: arguments.limit], arguments.seed):
            ours = same(gold, given)
            verdict = theirs(gold, given)
            asked[kind] += 1
            agreed[kind] += ours == verdict
            if arguments.show and ours != verdict:
                print(
                    f"{kind}: {gold!r} and {given!r}: ours {ours}, math-verify {verdict}",
                    file=sys.stderr,
                )
    print(
        json.dumps(
            {
                "pairs": asked.total(),
                "agreement": round(agreed.total() / asked.total(), 5),
                "by_kind": {kind: [agreed[kind], asked[kind]] for kind in asked},
            }
        )
    )


if __name__ == "__main__":
    main()
