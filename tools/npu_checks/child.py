"""One rank of one item of npu_check.py: python tools/npu_checks/child.py ITEM FOLDER --devices N ...

Started by npu_check.py through r1zero/distributed/spawn.py; leaves what it found in FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1]
# Its own folder must not stand on the path: its files would hide modules of others.
sys.path[0] = str(TOOLS)
sys.path.insert(0, str(TOOLS.parent))

import argparse
import importlib

from npu_checks.check import Check, CheckFailed, Outcome, write_outcome
from r1zero.distributed.launch import hush_torch, read_launch
from r1zero.distributed.log import hush_libraries
from r1zero.distributed.process import begin, end


def main(arguments: list[str]) -> int:
    """Run the item; returns the exit code."""
    hush_torch()
    hush_libraries()
    check = parse(arguments)
    module = importlib.import_module(f"npu_checks.{check.name}")
    try:
        figures = module.run(check)
    except CheckFailed as failure:
        write_outcome(check, Outcome("FAIL", failure.wrong, failure.advice))
        return 1
    write_outcome(check, Outcome("PASS", figures.line, values=figures.values))
    return 0


def parse(arguments: list[str]) -> Check:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("item")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--model", type=Path)
    args = parser.parse_args(arguments)
    return Check(args.item, read_launch(), args.devices, args.small, args.model, args.folder)


if __name__ == "__main__":
    begin()
    end(main(sys.argv[1:]))
