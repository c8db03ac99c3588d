"""RMSNorm (Zhang & Sennrich 2019, eq. 4): on an NPU by its fused kernel, on a CPU by
row_kernels.cpp where there is a compiler, else by PyTorch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from r1zero.ops import npu, row_kernels


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last axis: x [..., D], weight [D] -> [..., D]. Differentiable."""
    if x.device.type == "npu":
        return npu.rms_norm(x, weight, eps)
    if row_kernels.can_run(x, weight):
        return row_kernels.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)
