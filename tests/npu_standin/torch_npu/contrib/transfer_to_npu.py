"""Answers "cuda" with "npu" in the whole process, as torch_npu's module of this name does; MindSpeed
imports it."""

from __future__ import annotations

import functools
import sys

import torch

# They look at torch.cuda while they are imported, so they come before it is another module.
import torch._dynamo.trace_rules
import torch._dynamo.utils
import torch._inductor.utils
import torch.distributed.checkpoint.filesystem
import torch.distributed.device_mesh
import torch.distributed.fsdp

import torch_npu

FACTORIES = """
    arange as_tensor empty empty_like empty_strided eye full full_like linspace ones ones_like rand
    rand_like randint randn randn_like randperm scalar_tensor tensor zeros zeros_like
""".split()
METHODS = "new_empty new_full new_ones new_tensor new_zeros".split()


def _is_index(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _npu(value):
    """cuda, by name or as a device, becomes npu; everything else stays."""
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return value.replace("cuda", "npu")
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("npu") if value.index is None else torch.device("npu", value.index)
    return value


def _answering(function, moves=False):
    """Wrap a function that takes devices. A number is a device where `moves` says so, and as
    device=."""

    @functools.wraps(function)
    def answer(*args, **kwargs):
        given = [_npu(argument) for argument in args]
        if moves and len(given) > 1 and _is_index(given[1]):
            given[1] = f"npu:{given[1]}"
        if "device" in kwargs:
            device = kwargs["device"]
            kwargs["device"] = f"npu:{device}" if _is_index(device) else _npu(device)
        return function(*given, **kwargs)

    return answer


for _name in FACTORIES:
    setattr(torch, _name, _answering(getattr(torch, _name)))
for _name in METHODS:
    setattr(torch.Tensor, _name, _answering(getattr(torch.Tensor, _name)))
torch.Tensor.to = _answering(torch.Tensor.to, moves=True)
torch.nn.Module.to = _answering(torch.nn.Module.to, moves=True)
torch.nn.Module.to_empty = _answering(torch.nn.Module.to_empty)
torch.Tensor.cuda = torch.Tensor.npu
torch.Tensor.is_cuda = torch.Tensor.is_npu
torch.Tensor.record_stream = lambda tensor, stream: None  # there is one order of all work
torch.nn.Module.cuda = torch.nn.Module.npu
torch.jit.script = lambda what, *_, **__: what
torch.cuda = torch_npu.npu
sys.modules["torch.cuda"] = torch_npu.npu
