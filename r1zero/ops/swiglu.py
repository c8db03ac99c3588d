"""SwiGLU (Shazeer 2020): on a CPU by row_kernels.cpp where there is a compiler, else by PyTorch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from r1zero.ops import row_kernels


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of the last axis: [..., 2 F] -> [..., F]. Differentiable."""
    if row_kernels.can_run(gate_up):
        return row_kernels.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
