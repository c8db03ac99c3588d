"""Call a function in a process whose torch_npu is the stand-in of tests/npu_standin.

One process, started at the first call and kept for the rest of the tests: it takes the seconds of
importing torch once.
"""

from __future__ import annotations

import functools
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from support.patience import LONG

STANDIN = Path(__file__).resolve().parents[1] / "npu_standin"


def on_npu(function: Callable[..., Any], *args: Any) -> Any:
    """What `function(*args)` returns there; its exception is raised here. It must be defined at the
    top of a module."""
    return _process().submit(function, *args).result(timeout=LONG)


@functools.cache
def _process() -> ProcessPoolExecutor:
    # spawned: a fork of this process would have torch without the device
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_begin)


def _begin() -> None:
    sys.path.insert(0, str(STANDIN))
    import torch
    import torch_npu  # noqa: F401

    torch.set_num_threads(1)
