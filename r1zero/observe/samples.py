"""Every sample of a step as a parquet file: one row a response."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from r1zero.types import Group


def write_samples(path: Path, groups: Sequence[Group], decode: Callable[[np.ndarray], str]) -> None:
    """Write the groups to `path`, whole or not at all. `decode` turns tokens into text."""
    write_rows(path, sample_rows(groups, decode))


def sample_rows(
    groups: Sequence[Group], decode: Callable[[np.ndarray], str]
) -> list[dict[str, object]]:
    """Return a row for each response."""
    rows = []
    for group in groups:
        for member, sample in enumerate(group.samples):
            row = {
                "position": group.position,
                "member": member,
                "prompt_index": group.prompt.index,
                "prompt": group.prompt.text,
                "response": decode(sample.tokens),
                "ground_truth": group.prompt.answer,
                "reward": sample.reward,
                # nobody learned from it
                "advantage": None if math.isnan(sample.advantage) else sample.advantage,
                "prompt_length": len(group.prompt.tokens),
                "response_length": len(sample.tokens),
                "truncated": sample.truncated,
                "weights_version": sample.version,
                "failure": sample.failure,
            }
            for name, score in sample.scores.items():
                row |= {f"score/{name}": score.value, f"outcome/{name}": score.outcome.name.lower()}
            rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Write rows of equal keys to a parquet file, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(rows), partial, compression="zstd")
    os.replace(partial, path)
