#!/usr/bin/env python3
"""Take from two wheels of torch_npu the signatures of all that the project calls of it.

    pip download --no-deps torch_npu==2.7.1.post4    # the oldest release that is supported
    pip download --no-deps torch_npu==2.10.0.post7   # and the newest
    python tools/torch_npu_contract.py torch_npu-2.7.1*.whl torch_npu-2.10*.whl
    python tools/torch_npu_contract.py torch_npu-2.7.1*.whl torch_npu-2.10*.whl --check

Searches r1zero/ and tools/ for calls, reads the wheels as files, and writes the table in
tests/npu_standin/contract/ that tests hold every call to; --check compares instead. Exit codes: 0
done, or the same; 1 something that is called is not in a wheel, or the table differs; 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent), str(TOOLS)]

from npu_contract.calls import find_uses
from npu_contract.table import FOLDER, make_table, texts
from npu_contract.wheel import Wheel

from r1zero.errors import BadInput


def main() -> int:
    """Write or compare the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("oldest", type=Path, help="wheel of the oldest release that is supported")
    parser.add_argument("newest", type=Path, help="wheel of the newest one")
    parser.add_argument(
        "--check", action="store_true", help="compare with the table, write nothing"
    )
    args = parser.parse_args()
    try:
        oldest = Wheel(args.oldest)
        newest = Wheel(args.newest)
    except BadInput as error:
        print(f"torch_npu_contract: {error}", file=sys.stderr)
        return 2
    files = texts(make_table(oldest, newest, find_uses(TOOLS.parent).uses))
    if args.check:
        return _compare(files)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (FOLDER / name).write_text(text)
    return 0


def _compare(files: dict[str, str]) -> int:
    """Name the files of the table that differ from these."""
    differ = []
    for name, text in files.items():
        path = FOLDER / name
        if not path.is_file() or path.read_text() != text:
            differ.append(name)
    for name in differ:
        print(f"{FOLDER / name} differs from the wheels; run this without --check, and git diff")
    return min(len(differ), 1)


if __name__ == "__main__":
    sys.exit(main())
