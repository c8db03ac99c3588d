"""Comparing kernels of CPUs with PyTorch's operators: outputs and gradients, where there is a compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from r1zero.ops import compiled


def need_kernels(source: Path) -> None:
    """Skip where no compiler is; fail where one is and the kernels cannot be had."""
    library, reason = compiled.load(source)
    if reason.startswith("no C++ compiler"):
        pytest.skip(reason)
    assert library is not None, reason


def with_gradients(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor
) -> list[torch.Tensor]:
    """What a function returns, and the gradients of its inputs for a fixed gradient of that."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape).to(torch.bfloat16).to(out.dtype))
    gradients = [leaf.grad for leaf in leaves]
    return [out.detach(), *(grad for grad in gradients if grad is not None)]


def expect_equal(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float
) -> None:
    """Each is equal within `tolerance` of the largest number expected, or of 1."""
    for mine, right in zip(found, expected, strict=True):
        scale = max(1.0, right.abs().max().item()) if right.numel() else 1.0
        torch.testing.assert_close(mine.double(), right, rtol=0, atol=tolerance * scale)
