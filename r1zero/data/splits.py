"""Which split of a data set a name stands for: what is trained on, or what is held out.

Snapshots of hub data sets hold train-00000-of-00001.parquet beside test-00000-of-00001.parquet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from r1zero.errors import BadInput

_WORD = re.compile("[a-z]+")
_TRAINING = frozenset(("train", "training"))
_HELD_OUT = frozenset(
    ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation", "heldout")
)
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})")  # train-00000-of-00002.parquet
_SHOWN = 3  # names in a sentence


def is_of_other_split(name: str, held_out: bool) -> bool:
    """Whether a name stands for the other split than the one asked for, and not of both."""
    words = set(_WORD.findall(name.lower()))
    trains = bool(words & _TRAINING)
    tests = bool(words & _HELD_OUT)
    if held_out:
        return trains and not tests
    return tests and not trains


def choose(place: str, names: Iterable[str], held_out: bool, notes: list[str]) -> list[str]:
    """Return the names that are not of the other split; `notes` hears of those left out.

    `place` holds what is named. BadInput when all are of the other split.
    """
    names = list(names)
    left = [name for name in names if is_of_other_split(name, held_out)]
    kept = [name for name in names if name not in left]
    wanted = "evaluation" if held_out else "training"
    if left and not kept:
        raise BadInput(
            f"{place} holds nothing for {wanted}, by the names: {shown(left)}; if it is "
            "what you mean, name the file itself"
        )
    if left:
        notes.append(
            f"{place}: {shown(kept)} for {wanted}; left out, of another split: {shown(left)}"
        )
    return kept


def refuse_missing_shards(place: str, names: Iterable[str]) -> None:
    """BadInput where files say in their names that they are some of more, as a download that broke
    off leaves them."""
    found: dict[tuple[str, int], set[int]] = {}
    for name in names:
        match = _SHARD.match(name)
        if match is not None:
            shards = found.setdefault((match[1], int(match[3])), set())
            shards.add(int(match[2]))
    for (stem, total), shards in found.items():
        missing = [f"{stem}-{k:05d}-of-{total:05d}" for k in range(total) if k not in shards]
        if missing:
            raise BadInput(
                f"{place} holds {len(shards)} of the {total} files {stem}-*-of-{total:05d}: "
                f"{shown(missing)} is not there; copy it, or name the file itself that is meant"
            )


def shown(names: list[str]) -> str:
    """Write the first names, and how many more there are."""
    names = [Path(name).name for name in names]
    if len(names) > _SHOWN:
        more = f" and {len(names) - _SHOWN} more"
    else:
        more = ""
    return ", ".join(names[:_SHOWN]) + more
