"""The CPU's own operators: kernels.cpp, which ops/compiled.py compiles once per machine.

Without a C++ compiler, or where the library cannot be loaded, generation runs on PyTorch's operators,
slower and with equal results within float error.
"""

from __future__ import annotations

import ctypes
import logging
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from r1zero.models.family import Attend, LocalExperts
from r1zero.ops import compiled
from r1zero.rollout.block_attention import DecodeStep
from r1zero.rollout.npu_operators import NpuOperators
from r1zero.rollout.operators import Heads, Operators
from r1zero.rollout.sampler import Sampling

log = logging.getLogger("r1zero")

SOURCE = Path(__file__).with_name("kernels.cpp")

# Tokens of an expert on average, up to which the kernel is faster.
MOST_TOKENS_OF_EXPERT = 16

_int64 = ctypes.c_int64
_float = ctypes.c_float
_int = ctypes.c_int
_pointer = ctypes.c_void_p
SIGNATURES = {
    "add_norm": (_pointer, _pointer, _pointer, _pointer, _int64, _int64, _float, _int),
    "silu_mul": (_pointer, _pointer, _int64, _int64, _int),
    "experts": (_pointer, _pointer, _pointer, _pointer, _pointer, _pointer, _pointer),
    "attend": (_pointer, _pointer, _pointer, _pointer, _pointer, _pointer, _pointer),
    "attend_latent": (_pointer, _pointer, _pointer, _pointer, _pointer, _pointer),
    "sample": (_pointer, _pointer, _int64, _int64, _float, _pointer, _pointer, _int),
}


class _ExpertsOfLayerStruct(ctypes.Structure):
    """kernels.cpp's ExpertsOfLayer."""

    _fields_ = [
        ("tokens", _int64),
        ("top_k", _int64),
        ("width", _int64),
        ("inner", _int64),
        ("first", _int64),
        ("held", _int64),
        ("threads", _int64),
    ]


class _DecodeStepStruct(ctypes.Structure):
    """kernels.cpp's DecodeStep."""

    _fields_ = [
        ("rows", _int64),
        ("kv_heads", _int64),
        ("per_group", _int64),
        ("dim", _int64),
        ("value_dim", _int64),
        ("block", _int64),
        ("table_width", _int64),
        ("threads", _int64),
        ("eps", _float),
        ("scale", _float),
        ("table", _pointer),
        ("positions", _pointer),
        ("cos", _pointer),
        ("sin", _pointer),
    ]


def operators(heads: Heads) -> Operators:
    """Choose the fastest operators for these tensors."""
    kind = heads.cos.device.type
    if kind == "npu":
        return NpuOperators(heads)
    if kind != "cpu":
        return Operators(heads)
    library, reason = compiled.load(SOURCE)
    if library is None:
        log.warning("generation runs without kernels of its own, slower: %s", reason)
        return Operators(heads)
    return NativeOperators(heads, library)


class NativeOperators(Operators):
    """Operators by kernels.cpp, for float32 and bfloat16 on a CPU."""

    def __init__(self, heads: Heads, library: ctypes.CDLL) -> None:
        super().__init__(heads)
        self._kernels = {
            name: compiled.function(library, name, signature, heads.cos.dtype)
            for name, signature in SIGNATURES.items()
        }

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.empty_like(hidden)
        self._kernels["add_norm"](
            hidden.data_ptr(),
            None if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            *hidden.shape,
            self.heads.eps,
            torch.get_num_threads(),
        )
        return out, hidden

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows = gate_up.shape[0]
        width = gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        self._kernels["silu_mul"](
            gate_up.data_ptr(), out.data_ptr(), rows, width, torch.get_num_threads()
        )
        return out

    def experts(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        experts: LocalExperts,
    ) -> torch.Tensor:
        """As Operators.experts. Few tokens an expert are bound by reading its weights, which the
        kernel does once and as they lie; many are better off with oneDNN's products."""
        if ids.numel() > MOST_TOKENS_OF_EXPERT * experts.total:
            return super().experts(x, ids, weights, experts)
        _, width, inner = experts.down.shape
        described = _ExpertsOfLayerStruct(
            *ids.shape, width, inner, experts.first, len(experts.down), torch.get_num_threads()
        )
        x = x.contiguous()
        ids = ids.contiguous()
        weights = weights.contiguous()
        out = torch.empty_like(x)
        self._kernels["experts"](
            ctypes.byref(described),
            x.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            experts.gate_up.data_ptr(),
            experts.down.data_ptr(),
            out.data_ptr(),
        )
        return out

    def decoding(self, step: DecodeStep) -> Attend:
        return partial(self._attend_by_kernel, step, self._describe(step))

    def _attend_by_kernel(
        self,
        step: DecodeStep,
        described: _DecodeStepStruct,
        layer: int,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend in one layer: see Attend. `step` keeps the tensors that `described` points to."""
        pool = step.layout.pool
        heads = self.heads
        out = qkv.new_empty(len(qkv), heads.kv_heads * heads.per_group * heads.dim)
        self._kernels["attend"](
            ctypes.byref(described),
            pool.keys[layer].data_ptr(),
            pool.values[layer].data_ptr(),
            qkv.data_ptr(),
            None if q_norm is None else q_norm.data_ptr(),
            None if k_norm is None else k_norm.data_ptr(),
            out.data_ptr(),
        )
        return out

    def _attend_to_latents(
        self, step: DecodeStep, layer: int, query: torch.Tensor, turned: torch.Tensor
    ) -> torch.Tensor:
        """As Operators._attend_to_latents: a latent is read once for many heads."""
        pool = step.layout.pool
        described = self._describe(step)
        query = query.contiguous()
        turned = turned.contiguous()
        out = torch.empty_like(query)
        self._kernels["attend_latent"](
            ctypes.byref(described),
            pool.keys[layer].data_ptr(),
            pool.values[layer].data_ptr(),
            query.data_ptr(),
            turned.data_ptr(),
            out.data_ptr(),
        )
        return out

    def sample(
        self,
        logits: torch.Tensor,
        uniform: torch.Tensor,
        sampling: Sampling,
        group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if group is not None or sampling.top_k > 0 or sampling.top_p < 1.0:
            return super().sample(logits, uniform, sampling, group)
        logits = logits.contiguous()
        tokens = torch.empty(len(logits), dtype=torch.int64)
        logprobs = torch.empty(len(logits))
        self._kernels["sample"](
            logits.data_ptr(),
            uniform.data_ptr(),
            *logits.shape,
            sampling.temperature,
            tokens.data_ptr(),
            logprobs.data_ptr(),
            torch.get_num_threads(),
        )
        return tokens, logprobs

    def _describe(self, step: DecodeStep) -> _DecodeStepStruct:
        heads = self.heads
        table = step.layout.table
        return _DecodeStepStruct(
            len(table),
            heads.kv_heads,
            heads.per_group,
            step.layout.pool.keys.shape[-1],
            step.layout.pool.values.shape[-1],
            step.layout.pool.block,
            table.shape[1],
            torch.get_num_threads(),
            heads.eps,
            heads.scale,
            table.data_ptr(),
            step.positions.data_ptr(),
            heads.cos.data_ptr(),
            heads.sin.data_ptr(),
        )
