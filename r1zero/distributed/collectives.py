"""Collectives of the control plane over gloo: all-reduce, gather, broadcast, send, barrier.

It uses torch's own functions, kept here before anything else is imported. MindSpeed replaces
functions of torch.distributed while it is imported, in every module that has one under its name,
and thinks of HCCL only: its `all_reduce` adds up a float32 copy of a float64 tensor and throws the
sum away, on gloo, too. What a mapping keeps it does not find. Megatron, and the tensor plane as a
whole, go on with what MindSpeed has made of them.

Tensors are on the CPU, ranks are global.
"""

from __future__ import annotations

import pickle
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")

# Those that call no other function of torch.distributed, which could have been replaced: `send`,
# `recv` and all that take objects do.
_OWN = {
    name: getattr(dist, name) for name in ("all_reduce", "barrier", "broadcast", "irecv", "isend")
}


def all_sum(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum a tensor over a group, in place."""
    _OWN["all_reduce"](values, op=dist.ReduceOp.SUM, group=group)
    return values


def all_max(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Take the largest of each element over a group, in place."""
    _OWN["all_reduce"](values, op=dist.ReduceOp.MAX, group=group)
    return values


def barrier(group: dist.ProcessGroup) -> None:
    """Wait for all ranks of a group."""
    _OWN["barrier"](group=group)


def isend(tensor: torch.Tensor, rank: int, group: dist.ProcessGroup) -> dist.Work:
    """Start to send a tensor, which must stay as it is until the work is done."""
    return _OWN["isend"](tensor, rank, group=group)


def send(tensor: torch.Tensor, rank: int, group: dist.ProcessGroup) -> None:
    """Send a tensor."""
    isend(tensor, rank, group).wait()


def recv(tensor: torch.Tensor, rank: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Receive into a tensor of the size that is sent."""
    _OWN["irecv"](tensor, rank, group=group).wait()
    return tensor


def isend_object(
    value: object, rank: int, group: dist.ProcessGroup
) -> list[tuple[dist.Work, torch.Tensor]]:
    """Start to send an object; keep the works with their tensors until they are done."""
    payload = _packed(value)
    size = torch.tensor([payload.numel()], dtype=torch.int64)
    return [(isend(tensor, rank, group), tensor) for tensor in (size, payload)]


def recv_object(rank: int, group: dist.ProcessGroup) -> Any:
    """Receive an object."""
    size = recv(torch.zeros(1, dtype=torch.int64), rank, group)
    return _unpacked(recv(torch.empty(int(size), dtype=torch.uint8), rank, group))


def broadcast_object(value: T | None, source: int, group: dist.ProcessGroup) -> T:
    """Give what rank `source` holds, a T, to every rank of a group."""
    if dist.get_world_size(group) == 1:
        return cast(T, value)
    gives = dist.get_rank() == source
    if gives:
        payload = _packed(value)
    else:
        payload = torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([payload.numel()], dtype=torch.int64)
    _OWN["broadcast"](size, source, group=group)
    if not gives:
        payload = torch.empty(int(size), dtype=torch.uint8)
    _OWN["broadcast"](payload, source, group=group)
    if gives:
        return cast(T, value)
    return _unpacked(payload)


def gather_objects(value: T, group: dist.ProcessGroup) -> list[T] | None:
    """Collect a value of every rank of a group on the first of them, in order; None elsewhere."""
    ranks = dist.get_process_group_ranks(group)
    if dist.get_rank() == ranks[0]:
        return [value, *(recv_object(rank, group) for rank in ranks[1:])]
    for work, _ in isend_object(value, ranks[0], group):
        work.wait()
    return None


def _packed(value: object) -> torch.Tensor:
    """Pickle a value into bytes. Arrays travel as they are, without padding."""
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _unpacked(payload: torch.Tensor) -> Any:
    return pickle.loads(payload.numpy().data)
