#!/usr/bin/env python3
"""Make the report of a run, or one that compares several.

    python tools/report.py runs/tiny                       # writes runs/tiny/report.html
    python tools/report.py runs/tiny runs/tiny.1           # writes comparison.html
    python tools/report.py runs/* --output reports/all.html

The page opens from disk and needs no server and no network. Exit code 2 for a folder that is no
run.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from r1zero.config.command_line import CommandLine
from r1zero.config.paths import user_path
from r1zero.errors import BadInput
from r1zero.report.page import open_runs, write_report


def main() -> int:
    """Write one page; returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=user_path, metavar="RUN", help="folders with metrics.jsonl"
    )
    parser.add_argument(
        "--output", type=user_path, help="default RUN/report.html; of several comparison.html"
    )
    args = parser.parse_args()
    output = args.output or (
        args.runs[0] / "report.html" if len(args.runs) == 1 else Path("comparison.html")
    )
    try:
        histories = open_runs(args.runs)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_report(output, histories)
    except BadInput as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"report: {output} cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    told = [f"{len(history.metrics)} steps of {history.folder}" for history in histories]
    print(f"{output}: {', '.join(told)}, {output.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
