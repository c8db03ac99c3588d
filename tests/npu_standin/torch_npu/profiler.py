"""torch_npu.profiler: its interface. One empty file stands for the trace."""

from __future__ import annotations

import enum
from pathlib import Path


class ProfilerActivity(enum.Enum):
    """What may be recorded."""

    CPU = 0
    NPU = 1


def tensorboard_trace_handler(dir_name=None, worker_name=None, analyse_flag=True, async_mode=False):
    """What writes a trace into a folder of its own."""

    def write(_):
        folder = Path(dir_name) / f"{worker_name}_ascend_pt"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trace_view.json").touch()

    return write


class profile:
    """Records nothing, and calls the handler at its end."""

    def __init__(
        self,
        *,
        activities=None,
        schedule=None,
        on_trace_ready=None,
        record_shapes=False,
        profile_memory=False,
        with_stack=False,
        with_flops=False,
        with_modules=False,
        experimental_config=None,
        use_cuda=None,
    ):
        self._ready = on_trace_ready

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._ready:
            self._ready(self)
