"""Sample selection for the report: which samples of a step go in, and how they are packed.

The rule, which the page states: whole prompts with all their answers, as many as fit STEP_BYTES.
Prompts whose scoring failed come first, the others in a fixed shuffle of their rows in the data
set. The shuffle is the same at every step, so a prompt that comes again is kept again and its
answers can be compared. Texts longer than TEXT_LIMIT lose their middle.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from r1zero.scores import Outcome

STEP_BYTES = 40_000  # a packed step in the page
RAW_CHARACTERS = 400_000  # of a step before packing: bounds the seconds that it takes
TEXT_LIMIT = 8_000  # characters of one response
KEPT = ("member", "response", "reward", "advantage", "response_length", "truncated")
KEPT_IF_THERE = ("failure",)  # which older runs have not
SOURCE = "source"  # kept if data sets have names
PERCENTILES = (10, 50, 90)
FAILED = {outcome.name.lower() for outcome in Outcome if outcome.failed}


def length_percentiles(table: pa.Table) -> dict[str, float]:
    """Percentiles of the response lengths in tokens, over all samples of the step."""
    lengths = table["response_length"].to_numpy()
    return {
        f"response_length/p{share}": float(np.percentile(lengths, share)) for share in PERCENTILES
    }


def pack_step(table: pa.Table | None, spans: Sequence[Sequence[Any]]) -> str:
    """Pack the chosen samples of a step (None when it left none) and its spans: base64 of zlib of
    JSON."""
    if table is None:
        return _packed({"spans": spans})
    groups = _groups_by_priority(table)
    count = 0
    characters = 0
    while count < len(groups) and characters < RAW_CHARACTERS:
        characters += sum(_raw_characters(table, row) for row in groups[count])
        count += 1
    while True:
        packed = _packed(
            {"spans": spans, "total": table.num_rows} | _content(table, groups[:count])
        )
        if len(packed) <= STEP_BYTES or count == 1:
            return packed
        count = max(1, min(count - 1, int(count * STEP_BYTES / len(packed))))


def shortened(text: str) -> str:
    """Leave out the middle of a text that is longer than TEXT_LIMIT."""
    if len(text) <= TEXT_LIMIT:
        return text
    head = TEXT_LIMIT * 3 // 4
    tail = TEXT_LIMIT // 4
    return (
        f"{text[:head]}\n[... {len(text) - head - tail:,} characters left out ...]\n{text[-tail:]}"
    )


def finite(value: Any) -> Any:
    """Round a number to 6 digits; None stands for what JSON has no number for."""
    if isinstance(value, float):
        if np.isfinite(value):
            return float(f"{value:.6g}")
        return None
    return value


def _groups_by_priority(table: pa.Table) -> list[list[int]]:
    """Rows of each prompt of the batch, the prompts in the order in which they are kept."""
    positions = table["position"].to_pylist()
    indices = table["prompt_index"].to_pylist()
    outcomes = [
        table[name].to_pylist() for name in table.column_names if name.startswith("outcome/")
    ]
    failed = {
        positions[row]
        for column in outcomes
        for row, outcome in enumerate(column)
        if outcome in FAILED
    }
    rows: dict[int, list[int]] = {}
    for row, position in enumerate(positions):
        rows.setdefault(position, []).append(row)
    return [
        rows[position]
        for position in sorted(
            rows, key=lambda place: (place not in failed, _shuffled(indices[rows[place][0]]), place)
        )
    ]


def _shuffled(index: int) -> int:
    """Scatter row numbers over 32 bits, one to one (Knuth's multiplicative hash)."""
    return index * 2654435761 % 2**32


def _raw_characters(table: pa.Table, row: int) -> int:
    return min(len(table["response"][row].as_py()), TEXT_LIMIT)


def _content(table: pa.Table, groups: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Prompts, and columns of samples; `group` points from a sample to its prompt."""
    firsts = table.select(["prompt_index", "prompt", "ground_truth"]).take(
        [rows[0] for rows in groups]
    )
    chosen = table.take([row for rows in groups for row in rows])
    rules = [
        name.removeprefix("score/") for name in table.column_names if name.startswith("score/")
    ]
    kept = [*KEPT, *(name for name in KEPT_IF_THERE if name in table.column_names)]
    if SOURCE in table.column_names and any(chosen[SOURCE].to_pylist()):
        kept.append(SOURCE)
    columns = {}
    for name in kept:
        columns[name] = [finite(value) for value in chosen[name].to_pylist()]
    columns["response"] = [shortened(text) for text in columns["response"]]
    columns["group"] = [number for number, rows in enumerate(groups) for _ in rows]
    scores = {}
    for rule in rules:
        scores[rule] = {
            "value": [finite(value) for value in chosen[f"score/{rule}"].to_pylist()],
            "outcome": chosen[f"outcome/{rule}"].to_pylist(),
        }
    return {"prompts": firsts.to_pylist(), "samples": columns, "scores": scores}


def _packed(content: dict[str, Any]) -> str:
    raw = json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")
    return base64.b64encode(zlib.compress(raw, 6)).decode("ascii")
