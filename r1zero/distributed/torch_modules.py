"""torch_npu or torch.cuda: the module that drives a kind of device, imported on demand."""

from __future__ import annotations

from types import ModuleType

import torch


def torch_npu_module() -> ModuleType:
    """torch_npu, which is only installed on Ascend machines. ImportError elsewhere."""
    import torch_npu

    return torch_npu


def device_module(kind: str) -> ModuleType:
    """What stands for torch.cuda on this kind of device, "npu" or "cuda"."""
    if kind == "npu":
        return torch_npu_module().npu
    return torch.cuda
