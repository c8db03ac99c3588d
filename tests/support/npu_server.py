"""The warm parent of ranks on the stand-in for torch_npu: imports everything once, then forks.

Started by support/npu_worlds.py with the stand-in on its path. The CPU path is never used here: the
stand-in answers torch.cuda in the whole process.
"""

from __future__ import annotations

import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from r1zero.distributed.device import prepare

# Before anything imports Megatron, as every rank does.
DEVICE = prepare("npu", 0)

from support import npu_bodies  # noqa: E402
from support.forked import run_ranks  # noqa: E402
from support.warm_data import read_tiny  # noqa: E402
from torch_npu._record import write_seen  # noqa: E402

import r1zero.rollout.engine  # noqa: E402
import r1zero.trainer  # noqa: E402, F401

read_tiny()


def recorded(rank: int, size: int, store: str, name: str, *arguments: Any) -> Any:
    """Run a body and write down which operators ran: a rank that has given its result is killed."""
    result = getattr(npu_bodies, name)(rank, size, store, *arguments)
    write_seen()
    return result


def main(descriptor: int) -> None:
    """Answer requests (body, ranks, arguments) with (results, None) or (None, error)
    until the other end closes."""
    pipe = Connection(descriptor)
    while True:
        try:
            name, size, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((run_ranks(recorded, size, name, *arguments), None))
        except AssertionError as error:
            pipe.send((None, str(error)))
        except BaseException:  # noqa: BLE001 - the test shows it
            pipe.send((None, traceback.format_exc()))


if __name__ == "__main__":
    main(int(sys.argv[1]))
