#!/usr/bin/env python3
"""Turn GSM8K's own files into the trainer's columns.

    python tools/prepare_gsm8k.py train.jsonl data/gsm8k_train.parquet

IN is .jsonl or .parquet with the columns question and answer, where the answer ends in "####
1,234". OUT gets the columns question and ground_truth_answer (1234). Exit code 2 for a file that is
not of that form.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path[0] = str(Path(__file__).resolve().parents[1])

from r1zero.config.command_line import CommandLine
from r1zero.config.paths import user_path
from r1zero.data.indexed import check_writable
from r1zero.data.layout import ColumnLayout
from r1zero.data.problems import read_problems
from r1zero.data.tables import open_table
from r1zero.errors import BadInput

FINAL = re.compile(r"####\s*(-?[\d,]*\.?\d+)\s*$")


def final_answer(solution: str, place: str) -> str:
    """Return the number behind the last ####. BadInput when there is none."""
    match = FINAL.search(solution)
    if match is None:
        raise BadInput(f"{place}: the answer does not end in '#### NUMBER'")
    return match[1].replace(",", "")


def main() -> int:
    """Convert one file; returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("input", type=user_path)
    parser.add_argument("output", type=user_path)
    args = parser.parse_args()
    try:
        columns = {"prompt": "question", "response": "answer"}
        read_problems(args.input, ColumnLayout(columns, skip_key=""))  # refuses bad rows
        table = open_table(args.input, held_out=False, notes=[]).rows(list(columns.values()))
        rows = []
        for number, (_, row) in enumerate(table, 1):
            assert isinstance(row, dict), "unreadable rows were refused above"
            answer = final_answer(row["answer"], f"{args.input}, row {number}")
            rows.append({"question": row["question"], "ground_truth_answer": answer})
        check_writable(args.output)
    except BadInput as error:
        print(f"prepare_gsm8k: {error}", file=sys.stderr)
        return 2
    pq.write_table(pa.Table.from_pylist(rows), args.output, compression="zstd")
    print(f"{len(rows)} problems in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
