"""attention_kernels.cpp as a differentiable function: packed attention in one call on a CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r1zero.ops import compiled
from r1zero.ops.row_kernels import head_rows

SOURCE = Path(__file__).with_suffix(".cpp")

_int64 = ctypes.c_int64
_pointer = ctypes.c_void_p
SIGNATURES = {"attend": (_pointer,) * 6, "attend_backward": (_pointer,) * 10}


class _BatchStruct(ctypes.Structure):
    """attention_kernels.cpp's Batch."""

    _fields_ = [
        ("segments", _int64),
        ("heads", _int64),
        ("kv_heads", _int64),
        ("dim", _int64),
        ("value_dim", _int64),
        ("key_tokens", _int64),
        ("query_stride", _int64),
        ("key_stride", _int64),
        ("value_stride", _int64),
        ("threads", _int64),
        ("scale", ctypes.c_float),
        ("query_ends", _pointer),
        ("key_ends", _pointer),
        ("key_rows", _pointer),
    ]


def can_attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether there is a kernel for these tensors."""
    if query.device.type != "cpu" or query.dtype not in compiled.TYPES:
        return False
    if not query.dtype == key.dtype == value.dtype:
        return False
    return compiled.load(SOURCE)[0] is not None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ends: list[int],
    key_ends: list[int],
    key_rows: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """See attention.packed_causal_attention, whose segments these are; `can_attend` was asked."""
    return _Attend.apply(query, key, value, query_ends, key_ends, key_rows, scale)


class _Attend(torch.autograd.Function):
    """Keeps the output and one number a query and head for the backward pass, and no scores."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_ends: list[int],
        key_ends: list[int],
        key_rows: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        query = head_rows(query)
        key = head_rows(key)
        value = head_rows(value)
        ctx.ends = np.array(query_ends, np.int64), np.array(key_ends, np.int64)
        ctx.scale = scale
        out = query.new_empty(*query.shape[:2], value.shape[2])
        normaliser = torch.empty(query.shape[:2], dtype=torch.float32)
        batch = _describe(query, key, value, ctx.ends, key_rows, scale)
        _kernel("attend", query.dtype)(
            ctypes.byref(batch), *_pointers(query, key, value, out, normaliser)
        )
        ctx.save_for_backward(query, key, value, out, normaliser, key_rows)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, normaliser, key_rows = ctx.saved_tensors
        grad_query = torch.empty(query.shape, dtype=query.dtype)
        grad_key = torch.zeros(key.shape, dtype=torch.float32)
        grad_value = torch.zeros(value.shape, dtype=torch.float32)
        batch = _describe(query, key, value, ctx.ends, key_rows, ctx.scale)
        read = _pointers(query, key, value, out, grad := grad.contiguous(), normaliser)
        written = _pointers(grad_query, grad_key, grad_value)
        _kernel("attend_backward", query.dtype)(ctypes.byref(batch), *read, *written)
        grads = (grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype))
        return (*grads, None, None, None, None)


def _describe(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: tuple[np.ndarray, np.ndarray],
    key_rows: torch.Tensor | None,
    scale: float,
) -> _BatchStruct:
    """What the kernel is told; its arrays must live until it returns."""
    return _BatchStruct(
        len(ends[0]),
        query.shape[1],
        key.shape[1],
        query.shape[2],
        value.shape[2],
        len(key),
        query.stride(0),
        key.stride(0),
        value.stride(0),
        torch.get_num_threads(),
        scale,
        ends[0].ctypes.data,
        ends[1].ctypes.data,
        None if key_rows is None else key_rows.data_ptr(),
    )


def _pointers(*tensors: torch.Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _kernel(name: str, dtype: torch.dtype) -> Any:
    library, reason = compiled.load(SOURCE)
    assert library is not None, reason
    return compiled.function(library, name, SIGNATURES[name], dtype)
