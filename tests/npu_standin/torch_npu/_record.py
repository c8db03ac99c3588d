"""Which aten operators a process ran on the device: appended to the file that NPU_STANDIN_OPS names
when the process ends, to be held against the list of NPU kernels."""

from __future__ import annotations

import atexit
import os


def write_seen() -> None:
    """Append the names, if anybody asked for them."""
    from torch_npu import _device

    path = os.environ.get("NPU_STANDIN_OPS")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(f"{name}\n" for name in sorted(_device.seen()))


def record_at_exit() -> None:
    """Write when the process ends, by os._exit, too, as ranks do."""
    leave = os._exit

    def record_and_leave(code: int) -> None:
        write_seen()
        leave(code)

    os._exit = record_and_leave
    atexit.register(write_seen)
