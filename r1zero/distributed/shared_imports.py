"""Imports that ranks share: made once in the process that forks them, as far as a fork may have them.

PyTorch, Megatron and transformers take each new interpreter 4 to 5 s of CPU. A device cannot be
used by a fork of a process that has opened it, and torch_npu and MindSpeed replace functions of what
is imported after them. So ranks of NPUs and GPUs share PyTorch alone, and nothing here asks a driver.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Callable

from r1zero.distributed.launch import hush_torch
from r1zero.distributed.process import heavy_imports

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # 0: `import torch` does not import torch_npu


def import_shared(backend: str | None, import_program: Callable[[], None]) -> None:
    """Import what ranks with this `training.distributed_backend` share; on CPUs also what
    `import_program` does, in which Megatron may be."""
    from r1zero.distributed.log import hush_libraries

    hush_libraries()
    hush_torch()
    with heavy_imports():
        _import_torch()
        if is_surely_on_cpu(backend):
            from r1zero.distributed import device

            device.prepare("cpu", 0)
            import_program()
    gc.collect()
    gc.freeze()  # the ranks' garbage collectors leave these pages shared


def _import_torch() -> None:
    """Without torch_npu: each rank imports that for itself."""
    before = os.environ.get(AUTOLOAD)
    os.environ[AUTOLOAD] = "0"
    try:
        import torch  # noqa: F401
    finally:
        if before is None:
            del os.environ[AUTOLOAD]
        else:
            os.environ[AUTOLOAD] = before


def is_surely_on_cpu(backend: str | None) -> bool:
    """Whether that is sure without asking a driver."""
    import torch

    if backend == "gloo":
        return True
    is_cuda_build = bool(torch.version.cuda or torch.version.hip)
    return not is_cuda_build and importlib.util.find_spec("torch_npu") is None
