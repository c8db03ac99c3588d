"""Entry and exit of a rank: refuse bad input, join the world, fail so that all stop."""

from __future__ import annotations

import codecs
import contextlib
import gc
import locale
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

from r1zero.distributed.launch import Launch, hush_torch, launched, read_launch
from r1zero.distributed.npu_environment import set_defaults
from r1zero.distributed.open_files import raise_limit
from r1zero.distributed.placement import Placement
from r1zero.distributed.shutdown import BAD_INPUT
from r1zero.errors import BadInput

if TYPE_CHECKING:
    from r1zero.distributed.groups import World

T = TypeVar("T")
LET_FIRST_PRINT_SECONDS = 3.0


def refuse(problems: list[str], prints: bool, node: str = "") -> int:
    """Say what is wrong, once for the whole job; returns the exit code.

    `prints` in the process that prints for all; `node` names the node in the one that prints for a
    node: a file may be missing there alone.
    """
    # a launcher ends the job with its first process: let the one that prints do so
    if not prints:
        time.sleep(LET_FIRST_PRINT_SECONDS)
    for problem in problems if prints or node else ():
        print(f"r1zero: {node}{problem}", file=sys.stderr)
    return BAD_INPUT


def is_first() -> bool:
    """Whether this process prints for the job, as far as can be told; each does where the environment
    is broken."""
    try:
        return not launched() or read_launch().is_first
    except BadInput:
        return True


def begin() -> None:
    """Give the process what the program counts on: standard streams, and texts in UTF-8.

    A stream that was closed (`>&-`) would lend its number to the next file, and what libraries
    print would go into that. In a locale of another encoding (LC_ALL=zh_CN.GBK) Python reads files
    and paths in that; so the process starts again in Python's UTF-8 mode.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    if codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)


def tell(lines: Sequence[str]) -> int:
    """Print what was asked for; returns the exit code."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        return 0  # who reads has read enough, as `| head`
    except OSError as error:
        print(f"r1zero: standard output cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def end(exit_code: int) -> NoReturn:
    """End the process at once. All that counts is on disk by now, and a tracker whose server is
    dead may have left an exit hook that waits for it for ever."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        # nobody reads any more, as behind `| head`, or the terminal is closed
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(exit_code)


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Collect no garbage meanwhile: what is imported stays, and to look through it again and again is a
    sixth of the time that torch, Megatron and transformers take."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def run_rank(
    launch: Launch,
    placement: Placement,
    timeout: timedelta,
    on_cpu: bool,
    deterministic: bool,
    prepare: Callable[[World], T],
    work: Callable[[T], int | None],
) -> int:
    """Join the world, `prepare`, `work` with what it returns, and leave; returns the exit code,
    that of `work`.

    A BadInput of `prepare` is bad input. The imports are heavy, and Megatron must come after the
    device is set, so `prepare` may import it and its callers may not.
    """
    from r1zero.distributed.log import hush_libraries

    hush_libraries()
    hush_torch()
    raise_limit()
    with heavy_imports():
        from r1zero.distributed import device as devices
        from r1zero.distributed.groups import World
        from r1zero.distributed.rendezvous import join
        from r1zero.distributed.watchdog import FailureWatch

    kind = "cpu" if on_cpu else devices.detect()
    roles = placement.roles_of(launch.rank)
    if kind == "npu":
        set_defaults(os.environ, "rollout" in roles, timeout)
    with heavy_imports():
        device = devices.prepare(kind, launch.local_rank, deterministic)
    try:
        store = join(launch, timeout.total_seconds())
    except BadInput as error:  # the ranks did not find each other
        return refuse([str(error)], launch.is_first, launch.other_node)
    watch = FailureWatch(store, launch.rank, launch.node_of_rank, "+".join(roles))
    try:
        world = World(launch, placement, device, timeout, store)
        world.watch = watch
        exit_code = work(prepare(world)) or 0
        world.barrier()  # while others still work, all are watched
        watch.stop()
        world.leave()
        return exit_code
    except Exception as error:  # noqa: BLE001
        # the edge of the process: tell the other ranks, then end
        watch.end_process(error, BAD_INPUT if isinstance(error, BadInput) else 1)
