"""Run a test body on several ranks: forked from one parent that has the heavy imports, over a file
store.

Forking saves the seconds of importing torch and Megatron per rank, a file store has no ports to
race for, and the first traceback wins. What device the ranks have is the parent's affair
(support/multiproc.py, support/npu_server.py).
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.patience import LONG
from support.warm_rewards import fork_from_here

LOOK_SECONDS = 0.1


def run_ranks(
    body: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = LONG
) -> list[Any]:
    """Call `body(rank, world_size, store, *args)` on each rank and return the results in rank
    order.

    The first exception of any rank is raised here with its traceback; so is a time-out.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        processes = [
            context.Process(
                target=_child, args=(body, rank, world_size, folder, queue, timeout_seconds, args)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(processes, queue, time.monotonic() + timeout_seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(processes: list, queue: Any, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    left = {process.sentinel for process in processes}
    while len(results) < len(processes):
        # for a result, or for the end of one; what a killed rank has forked may hide that
        wait([queue._reader, *left], LOOK_SECONDS)
        if not queue.empty():
            rank, value, error = queue.get()
            if error:
                raise AssertionError(f"rank {rank} of {len(processes)}:\n{error}")
            results[rank] = pickle.loads(value)
            continue
        dead = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if dead and queue.empty():
            raise AssertionError(
                f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode}"
            )
        if time.monotonic() > deadline:
            raise AssertionError(
                f"time limit: ranks {sorted(set(range(len(processes))) - set(results))} are not "
                "done"
            )
        # one that has ended well has put its result there before
        left = {process.sentinel for process in processes if process.exitcode is None}
    return [results[rank] for rank in range(len(processes))]


def _child(
    body: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    queue: Any,
    timeout_seconds: float,
    args: tuple,
) -> None:
    # Armed here: a watchdog thread of the parent would deadlock the forked child.
    faulthandler.dump_traceback_later(timeout_seconds - 5, exit=True)
    torch.set_num_threads(1)
    fork_from_here()
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    store.set_timeout(timedelta(seconds=timeout_seconds))
    try:
        result, error = body(rank, world_size, store, *args), None
    except BaseException:  # noqa: BLE001 - the edge of the process: the parent shows it
        result, error = None, traceback.format_exc()
    # by value: the queue itself would share tensors by file handle
    queue.put((rank, pickle.dumps(result), error))
    if error:
        # keep connections open, so that no later error hides the first one
        time.sleep(timeout_seconds)
    if dist.is_initialized():
        dist.destroy_process_group()
    os._exit(0)
