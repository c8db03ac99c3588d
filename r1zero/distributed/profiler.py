"""Profiler traces: a Chrome trace of torch.profiler, on an NPU what torch_npu's profiler writes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from r1zero.distributed.torch_modules import torch_npu_module

log = logging.getLogger("r1zero")


@contextlib.contextmanager
def trace(kind: str, folder: Path, name: str) -> Iterator[None]:
    """Record what runs meanwhile on the host and on a device of this kind.

    Written as folder/name.json.gz, or by the NPU's profiler into a folder of that name. A trace
    that cannot be written is a warning, since training goes on without it.
    """
    with _npu_profile(folder, name) if kind == "npu" else _torch_profile(kind, folder, name):
        yield


def _npu_profile(folder: Path, name: str) -> AbstractContextManager[Any]:
    profiler = torch_npu_module().profiler
    return profiler.profile(
        activities=[profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU],
        on_trace_ready=profiler.tensorboard_trace_handler(str(folder), worker_name=name),
    )


def _torch_profile(kind: str, folder: Path, name: str) -> AbstractContextManager[Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if kind == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    write = partial(_write_trace, folder / f"{name}.json.gz")
    # with the shapes of operators' arguments, from which tools/trace_split.py counts operations
    return torch.profiler.profile(activities=activities, on_trace_ready=write, record_shapes=True)


def _write_trace(path: Path, recorded: torch.profiler.profile) -> None:
    """Write a Chrome trace; where that fails, as on a full disk, a warning is all."""
    try:
        for folder in (path.parent.parent, path.parent):  # owner.py says why not with all around
            folder.mkdir(exist_ok=True)
        recorded.export_chrome_trace(str(path))
    except OSError as error:
        log.warning(
            "warning: %s could not be written: %s; training goes on without it", path, error
        )
