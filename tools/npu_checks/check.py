"""What an item of npu_check.py is given, and what it gives back. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from r1zero.distributed.launch import Launch


@dataclass(frozen=True, slots=True)
class Check:
    """What an item is given on each of its ranks."""

    name: str  # of the item
    launch: Launch  # this rank's place among the item's processes
    devices: int  # NPUs that the whole check may use
    small: bool  # small shapes, short waits
    model: Path | None  # the user's model of 0.5B parameters; None: one with random weights
    folder: Path  # of this item, the same on all its ranks, empty at the start


@dataclass(frozen=True, slots=True)
class Figures:
    """What a passed item has measured."""

    line: str  # what is printed
    values: Mapping[str, Any] = field(default_factory=dict)  # for the JSON, as far as it goes


class CheckFailed(Exception):
    """What an item found wrong, and the next thing to do, a sentence each."""

    def __init__(self, wrong: str, advice: str) -> None:
        super().__init__(wrong)
        self.wrong = wrong
        self.advice = advice


Verdict = Literal["PASS", "FAIL", "SKIP"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an item ended."""

    verdict: Verdict
    line: str  # figures of PASS, what is wrong of FAIL, the reason of SKIP
    advice: str = ""  # the next thing to do, where there is one
    values: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    output: str = ""  # the last lines that the processes of a failed item printed


def write_outcome(check: Check, outcome: Outcome) -> None:
    """Leave what this rank found where the parent reads it."""
    path = _path(check.folder, check.launch.rank)
    path.write_text(json.dumps(asdict(outcome)))


def read_outcomes(folder: Path) -> list[tuple[int, Outcome]]:
    """(rank, outcome) of every rank that has left one."""
    found = []
    for path in folder.glob("outcome.*.json"):
        rank = int(path.suffixes[0][1:])
        found.append((rank, Outcome(**json.loads(path.read_text()))))
    return sorted(found, key=lambda pair: pair[0])


def _path(folder: Path, rank: int) -> Path:
    return folder / f"outcome.{rank}.json"
