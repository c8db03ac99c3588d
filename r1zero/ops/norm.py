"""RMSNorm (Zhang & Sennrich 2019, eq. 4): on an NPU by its fused kernel, elsewhere by PyTorch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from r1zero.ops import npu


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last axis: x [..., D], weight [D] -> [..., D]. Differentiable."""
    if x.device.type == "npu":
        return npu.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)
