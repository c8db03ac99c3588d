"""RoPE: rotary position embedding (RoFormer, eq. 34), halves turned against each other."""

from __future__ import annotations

import torch

from r1zero.ops import npu, row_kernels


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn x [..., D] by its position: halves (a, b) -> (a cos - b sin, b cos + a sin); tables
    broadcast.
    """
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def pairs_to_halves(x: torch.Tensor) -> torch.Tensor:
    """Columns whose pairs lie side by side, as the halves that `rotate` turns against each other.

    >>> pairs_to_halves(torch.tensor([0, 1, 2, 3, 4, 5]))
    tensor([0, 2, 4, 1, 3, 5])
    """
    return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)


def rotate_packed(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the heads of a packed batch, x [T, heads, D], by cos and sin [T, 1, D]. Differentiable
    by x.

    On an NPU by its fused kernel, on a CPU by row_kernels.cpp where there is a compiler, else as
    `rotate`.
    """
    if x.device.type == "npu":
        return npu.rotary_mul(x[None], cos[None], sin[None])[0]
    if row_kernels.can_run(x, cos, sin):
        return row_kernels.rotate(x, cos, sin)
    return rotate(x, cos, sin)
