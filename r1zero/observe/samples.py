"""Every sample of a step as rows of a parquet file: one row a response."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from r1zero.algo.selection import SURPLUS, TRUNCATED
from r1zero.types import Group

# The columns of every file, whatever its rows hold: files of several replicas are read as one table.
COLUMNS = {
    "position": pa.int64(),
    "member": pa.int64(),
    "prompt_index": pa.int64(),
    "prompt": pa.string(),
    "response": pa.string(),
    "ground_truth": pa.string(),
    "reward": pa.float64(),
    "advantage": pa.float64(),  # null: nobody learned from it
    "prompt_length": pa.int64(),
    "response_length": pa.int64(),
    "truncated": pa.bool_(),
    "weights_version": pa.int64(),
    "failure": pa.string(),
    "dropped": pa.string(),  # why nobody learned from it, "" if somebody did
    "source": pa.string(),  # the data set that it is from, if that has a name
}
SCORE = "score/"
OUTCOME = "outcome/"


def sample_rows(
    groups: Sequence[Group], decode: Callable[[np.ndarray], str]
) -> list[dict[str, object]]:
    """Return a row for each response, without its advantage. `decode` turns tokens into text."""
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
                "advantage": None,
                "prompt_length": len(group.prompt.tokens),
                "response_length": len(sample.tokens),
                "truncated": sample.truncated,
                "weights_version": sample.version,
                "failure": sample.failure,
                "dropped": group.dropped or ("" if sample.trains else TRUNCATED),
                "source": group.prompt.source,
            }
            for name, score in sample.scores.items():
                row |= {SCORE + name: score.value, OUTCOME + name: score.outcome.name.lower()}
            rows.append(row)
    return rows


def sample_table(
    groups: Sequence[Group], decode: Callable[[np.ndarray], str], functions: Sequence[str]
) -> pa.Table:
    """The rows of some groups, of which there is one, as a table in the order of their positions.

    There are columns for all reward functions; what one did not score is null. The advantages are
    still to come. What a checkpoint held may have scores of functions that are none of these, which are
    left out.
    """
    rows = sample_rows(sorted(groups, key=lambda group: group.position), decode)
    columns = dict(COLUMNS)
    for name in functions:
        columns[SCORE + name] = pa.float64()
        columns[OUTCOME + name] = pa.string()
    return pa.Table.from_pylist(rows, pa.schema(columns))


def with_advantages(table: pa.Table, advantages: np.ndarray) -> pa.Table:
    """The table with its advantages, from those of the whole batch: [P, G], NaN where nobody
    learned. Of what was dropped there is none, though it may have been computed."""
    found = advantages[table["position"].to_numpy(), table["member"].to_numpy()].astype(np.float64)
    why = table["dropped"].to_numpy()
    why = np.where((why == "") & np.isnan(found), SURPLUS, why)
    values = pa.array(found, COLUMNS["advantage"], mask=why != "")
    reasons = pa.array(why, COLUMNS["dropped"])
    return _with_column(_with_column(table, "advantage", values), "dropped", reasons)


def _with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """The table with other values in a column."""
    number = table.column_names.index(name)
    return table.set_column(number, table.field(number), values)


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Write rows of equal keys to a parquet file, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    write_table(partial, pa.Table.from_pylist(rows))
    os.replace(partial, path)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table to a parquet file. OSError, and a part of a file, when that fails."""
    pq.write_table(table, path, compression="zstd")
