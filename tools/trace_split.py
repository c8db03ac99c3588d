#!/usr/bin/env python3
"""Split the reference and update phases of a traced step into products, attention, logits and the rest.

    python r1zero/main.py --config ... training.profile_steps='[3]'
    python tools/trace_split.py runs/.../profile/step_000003/train_rollout_ref_rank_0000.json.gz

All numbers are counted from the trace (training.profile_steps): seconds of its events, and the
floating-point operations that follow from the shapes of its matrix products. `products` are all of
them but attention's, `logits` is what the log-probs cost beside their products. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = ("ref", "update")
# The operands of a product among its arguments.
PRODUCTS = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}
ATTENTION = (
    "_Attend",
    "_AttendBackward",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
)
LOGITS = ("_TokenLogProbs", "_TokenLogProbsBackward")


@dataclass(slots=True)
class Split:
    """Seconds of one phase, and the operations of its products."""

    seconds: float = 0.0
    products: float = 0.0
    attention: float = 0.0
    logits: float = 0.0
    operations: float = 0.0

    @property
    def rest(self) -> float:
        """Seconds of everything else."""
        return self.seconds - self.products - self.attention - self.logits

    def report(self, peak: float | None = None) -> dict[str, float]:
        """By name, in seconds; with the `peak` of the processor, in operations a second, also what the
        products need at least, and which share of it the whole phase reaches."""
        names = ("seconds", "products", "attention", "logits", "rest")
        told = {name: getattr(self, name) for name in names}
        if peak is not None and self.seconds > 0:
            told["limit"] = self.operations / peak
            told["share_of_limit"] = told["limit"] / self.seconds
        return told


def main() -> int:
    """Print the split of a trace; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path, help="a .json.gz below profile/ of a run folder")
    path = parser.parse_args().trace
    if not path.is_file():
        print(f"trace_split.py: {path} does not exist", file=sys.stderr)
        return 2
    splits = split(read(path))
    print(json.dumps({phase: found.report() for phase, found in splits.items()}))
    return 0


def read(path: Path) -> list[dict[str, Any]]:
    """The complete events of a Chrome trace."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def split(events: Sequence[Mapping[str, Any]]) -> dict[str, Split]:
    """Split the phases of a step. An event belongs to the phase that it begins in."""
    spans = [event for event in events if event["name"] in PHASES]
    found = {phase: Split() for phase in PHASES}
    for span in spans:
        inside = list(_inside(span, events))
        phase = found[span["name"]]
        phase.seconds += _seconds([span])
        products = [event for event in inside if event["name"] in PRODUCTS]
        attention = [event for event in inside if event["name"] in ATTENTION]
        logits = [event for event in inside if event["name"] in LOGITS]
        of_logits = [event for outer in logits for event in _inside(outer, products)]
        phase.products += _seconds(products)
        phase.attention += _seconds(attention)
        phase.logits += _seconds(logits) - _seconds(of_logits)
        phase.operations += sum(map(operations, products))
    return found


def operations(product: Mapping[str, Any]) -> float:
    """Multiplications and additions of a matrix product [..., m, k] [..., k, n]: 2 m k n for each pair."""
    shapes = product["args"]["Input Dims"]
    left, right = (shapes[place] for place in PRODUCTS[product["name"]])
    count = 2.0 * right[-1]
    for size in left:
        count *= size
    return count


def _inside(outer: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> Iterator[Mapping]:
    end = outer["ts"] + outer["dur"]
    return (event for event in events if outer["ts"] <= event["ts"] < end)


def _seconds(events: Sequence[Mapping[str, Any]]) -> float:
    """Microseconds of a trace, added up."""
    return sum(event["dur"] for event in events) / 1e6


if __name__ == "__main__":
    sys.exit(main())
