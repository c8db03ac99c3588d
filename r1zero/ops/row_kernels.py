"""row_kernels.cpp as functions of tensors: what lies between the matrix products of a training step.

Each differentiable one keeps its input, and no step in between, for the backward pass.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from r1zero.ops import compiled

SOURCE = Path(__file__).with_suffix(".cpp")

_int64 = ctypes.c_int64
_float = ctypes.c_float
_int = ctypes.c_int
_pointer = ctypes.c_void_p
_ROTATE = (*(_pointer,) * 4, *(_int64,) * 4, _int)
SIGNATURES = {
    "rms_norm": (*(_pointer,) * 4, _int64, _int64, _float, _int),
    "rms_norm_backward": (*(_pointer,) * 6, _int64, _int64, _int),
    "swiglu": (_pointer, _pointer, _int64, _int64, _int),
    "swiglu_backward": (*(_pointer,) * 3, _int64, _int64, _int),
    "rotate": _ROTATE,
    "rotate_backward": _ROTATE,
    "softmax_sums": (_pointer, _float, *(_pointer,) * 3, _int64, _int64, _int),
    "softmax_gradient": (_pointer, _float, *(_pointer,) * 5, _int64, _int64, _int),
}


def can_run(*tensors: torch.Tensor) -> bool:
    """Whether there are kernels for these tensors: on a CPU, of one type, with a compiler at hand."""
    first = tensors[0]
    if first.device.type != "cpu" or first.dtype not in compiled.TYPES:
        return False
    if any(tensor.dtype != first.dtype for tensor in tensors):
        return False
    return compiled.load(SOURCE)[0] is not None


def head_rows(x: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, D] whose heads of a token lie side by side: a part of a wider tensor may."""
    if x.stride()[1:] == (x.shape[2], 1):
        return x
    return x.contiguous()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis: x [..., D], weight [D] -> [..., D]. Differentiable."""
    return _RmsNorm.apply(x, weight, eps)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of the last axis: [..., 2 F] -> [..., F]. Differentiable."""
    return _Swiglu.apply(gate_up)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the heads x [T, heads, D] by cos and sin [T, 1, D]. Differentiable by x."""
    return _Rotate.apply(x, cos.contiguous(), sin.contiguous())


def softmax_sums(logits: torch.Tensor, scale: float) -> torch.Tensor:
    """The largest of scale * logits, the sum of exp(scale * logits - largest), and that of
    (scale * logits - largest) times it: [R, V] -> fp32 [3, R]."""
    sums = torch.empty(3, len(logits))
    _kernel("softmax_sums", logits)(
        logits.data_ptr(),
        scale,
        *_pointers(*sums),
        *logits.shape,
        torch.get_num_threads(),
    )
    return sums


def softmax_gradient_(
    logits: torch.Tensor,
    scale: float,
    targets: torch.Tensor,
    normaliser: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprob: torch.Tensor,
    grad_entropy: torch.Tensor,
) -> None:
    """Turn logits [R, V] into their gradient, see vocab.logits_gradient_. targets int64 [R], -1 where
    there is none; the others fp32 [R], without gaps."""
    _kernel("softmax_gradient", logits)(
        logits.data_ptr(),
        scale,
        *_pointers(targets, normaliser, entropy, grad_logprob, grad_entropy),
        *logits.shape,
        torch.get_num_threads(),
    )


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        scales = torch.empty(x.shape[:-1], dtype=torch.float32)
        pointers = _pointers(x, weight, out, scales)
        _kernel("rms_norm", x)(*pointers, *_table(x), eps, torch.get_num_threads())
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = torch.empty_like(x)
        grad_weight = torch.empty_like(weight)
        pointers = _pointers(x, weight, grad, scales, grad_x, grad_weight)
        _kernel("rms_norm_backward", x)(*pointers, *_table(x), torch.get_num_threads())
        return grad_x, grad_weight, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        _kernel("swiglu", out)(*_pointers(gate_up, out), *_table(out), torch.get_num_threads())
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        grad = grad.contiguous()
        grad_gate_up = torch.empty_like(gate_up)
        pointers = _pointers(gate_up, grad, grad_gate_up)
        _kernel("swiglu_backward", grad)(*pointers, *_table(grad), torch.get_num_threads())
        return grad_gate_up


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned("rotate", x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _turned("rotate_backward", grad, *ctx.saved_tensors), None, None


def _turned(name: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x = head_rows(x)
    tokens, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype)
    pointers = _pointers(x, cos, sin, out)
    _kernel(name, x)(*pointers, tokens, heads, dim // 2, x.stride(0), torch.get_num_threads())
    return out


def _table(x: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of [..., columns]."""
    columns = x.shape[-1]
    return x.numel() // max(1, columns), columns


def _pointers(*tensors: torch.Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _kernel(name: str, x: torch.Tensor) -> Callable[..., None]:
    library, reason = compiled.load(SOURCE)
    assert library is not None, reason
    return compiled.function(library, name, SIGNATURES[name], x.dtype)
