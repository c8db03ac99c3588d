"""Collectives of the control plane over gloo: all-reduce, gather, broadcast, send, barrier.

It uses torch's own functions, kept here before anything else is imported. MindSpeed replaces
functions of torch.distributed while it is imported, in every module that has one under its name,
and thinks of HCCL only: its `all_reduce` adds up a float32 copy of a float64 tensor and throws the
sum away, on gloo, too. What a mapping keeps it does not find. Megatron, and the tensor plane as a
whole, go on with what MindSpeed has made of them.

Tensors are on the CPU, ranks are global. Between two ranks, messages of one tag arrive in the order
in which they were sent; those of different tags do not wait for each other.
"""

from __future__ import annotations

import pickle
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")

CONTROL = 0  # the tag of plans, records and decisions

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


def isend(
    tensor: torch.Tensor, rank: int, group: dist.ProcessGroup, tag: int = CONTROL
) -> dist.Work:
    """Start to send a tensor, which must stay as it is until the work is done."""
    return _OWN["isend"](tensor, rank, group=group, tag=tag)


def send(tensor: torch.Tensor, rank: int, group: dist.ProcessGroup) -> None:
    """Send a tensor."""
    isend(tensor, rank, group).wait()


def recv(
    tensor: torch.Tensor, rank: int, group: dist.ProcessGroup, tag: int = CONTROL
) -> torch.Tensor:
    """Receive into a tensor of the size that is sent."""
    _OWN["irecv"](tensor, rank, group=group, tag=tag).wait()
    return tensor


def isend_bytes(
    payload: torch.Tensor, rank: int, group: dist.ProcessGroup, tag: int = CONTROL
) -> list[tuple[dist.Work, torch.Tensor]]:
    """Start to send bytes, uint8 of any size; keep the works with their tensors until they are
    done."""
    size = torch.tensor([payload.numel()], dtype=torch.int64)
    return [(isend(tensor, rank, group, tag), tensor) for tensor in (size, payload)]


def recv_bytes(rank: int, group: dist.ProcessGroup, tag: int = CONTROL) -> torch.Tensor:
    """Receive bytes, uint8 of the size that is sent."""
    size = recv(torch.zeros(1, dtype=torch.int64), rank, group, tag)
    return recv(torch.empty(int(size), dtype=torch.uint8), rank, group, tag)


def isend_object(
    value: object, rank: int, group: dist.ProcessGroup, tag: int = CONTROL
) -> list[tuple[dist.Work, torch.Tensor]]:
    """Start to send an object; keep the works with their tensors until they are done."""
    return isend_bytes(_packed(value), rank, group, tag)


def recv_object(rank: int, group: dist.ProcessGroup, tag: int = CONTROL) -> Any:
    """Receive an object."""
    return _unpacked(recv_bytes(rank, group, tag))


def broadcast_bytes(
    payload: torch.Tensor | None, source: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """Give the bytes that rank `source` holds, uint8, to every rank of a group."""
    gives = dist.get_rank() == source
    if payload is None:
        assert not gives, "the source has something to give"
        payload = torch.empty(0, dtype=torch.uint8)
    if dist.get_world_size(group) == 1:
        return payload
    size = torch.tensor([payload.numel()], dtype=torch.int64)
    _OWN["broadcast"](size, source, group=group)
    if not gives:
        payload = torch.empty(int(size), dtype=torch.uint8)
    _OWN["broadcast"](payload, source, group=group)
    return payload


def broadcast_object(value: T | None, source: int, group: dist.ProcessGroup) -> T:
    """Give what rank `source` holds, a T, to every rank of a group."""
    if dist.get_world_size(group) == 1:
        return cast(T, value)
    if dist.get_rank() == source:
        broadcast_bytes(_packed(value), source, group)
        return cast(T, value)
    return _unpacked(broadcast_bytes(None, source, group))


def gather_objects(value: T, group: dist.ProcessGroup) -> list[T] | None:
    """Collect a value of every rank of a group on the first of them, in order; None elsewhere."""
    ranks = dist.get_process_group_ranks(group)
    if dist.get_rank() == ranks[0]:
        return [value, *(recv_object(rank, group) for rank in ranks[1:])]
    for work, _ in isend_object(value, ranks[0], group):
        work.wait()
    return None


def first_finding(finding: tuple[int, str] | None, group: dist.ProcessGroup) -> str | None:
    """Give every rank the sentence with the lowest number; of several ranks that have it, the first
    one's. None where no rank found anything.

    One number of each rank is compared. Sentences stay where they are, but for the one.
    """
    size = dist.get_world_size(group)
    nothing = torch.iinfo(torch.int64).max
    place = nothing
    if finding is not None:
        place = finding[0] * size + dist.get_rank(group)
    first = -int(all_max(torch.tensor([-place]), group))
    if first == nothing:
        return None
    speaker = dist.get_process_group_ranks(group)[first % size]
    sentence = None
    if finding is not None:
        sentence = finding[1]
    return broadcast_object(sentence, speaker, group)


def _packed(value: object) -> torch.Tensor:
    """Pickle a value into bytes. Arrays travel as they are, without padding."""
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _unpacked(payload: torch.Tensor) -> Any:
    return pickle.loads(payload.numpy().data)
