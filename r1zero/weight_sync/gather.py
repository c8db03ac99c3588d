"""Gather whole parameters on the ranks that write them, for export."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.distributed as dist

from r1zero.distributed.collectives import isend, recv
from r1zero.distributed.groups import World
from r1zero.distributed.placement import RankGrid
from r1zero.models.config import ModelConfig
from r1zero.models.params import (
    ParamSpec,
    Shards,
    Stages,
    local_shape,
    merge,
    param_table,
    stage_of,
)

PENDING = 4  # shards that a rank has on their way, so that it goes on while receivers write


@dataclass(frozen=True, slots=True)
class Assignment:
    """A whole parameter for one rank, from the ranks of one replica."""

    tensor: ParamSpec
    replica: int
    receiver: int


def to_controller(shape: ModelConfig) -> list[Assignment]:
    """All parameters for the controller, from the first replica, in the order of the table."""
    return [Assignment(tensor, 0, 0) for tensor in param_table(shape)]


def writers_of(files: Sequence[Sequence[ParamSpec]], num_layers: int, span: RankGrid) -> list[int]:
    """The train rank that writes each of these files, given by the parameters in them.

    Files go round the replicas, which lie on different nodes, and in a replica to the stage of their
    first parameter, round its TP ranks. TP 2, DP 2, PP 2, ranks 0 to 7, four layers, six files:

        stage 0, layers 0 1    replica 0: 0 1    replica 1: 2 3
        stage 1, layers 2 3    replica 0: 4 5    replica 1: 6 7

        file       0    1    2    3    4    5
        layer      -    0    1    2    2    3
        replica    0    1    0    1    0    1
        TP index   0    0    1    1    0    0
        writer     0    2    1    7    4    6
    """
    writers = []
    for number, tensors in enumerate(files):
        turn, replica = divmod(number, span.dp)
        stage = stage_of(tensors[0], Stages.of(num_layers, span))
        writers.append(span.rank_at(tp=turn % span.tp, dp=replica, pp=stage))
    return writers


def assignments(
    files: Sequence[Sequence[ParamSpec]], writers: Sequence[int], span: RankGrid
) -> list[Assignment]:
    """Bring each file's parameters to its writer, the first of every file, then the second of every
    file, so that all writers have work."""
    planned: dict[tuple[str, int], Assignment] = {}
    for row in zip_longest(*files):
        for tensor, writer in zip(row, writers, strict=True):
            if tensor is not None:
                replica = span.index_of(writer)["dp"]
                # one that lies in two files of a writer comes once
                planned.setdefault((tensor.name, writer), Assignment(tensor, replica, writer))
    return list(planned.values())


def gather_tensors(
    world: World,
    shape: ModelConfig,
    parameters: Mapping[str, torch.Tensor],
    plan: Sequence[Assignment] | None = None,
) -> Iterator[tuple[ParamSpec, torch.Tensor]]:
    """Yield (entry, whole tensor on the CPU) for the assignments to this rank, in their order.

    Train ranks, all of which hold the same plan, iterate to its end together. Without a plan
    everything goes to the controller. `parameters` are this rank's, by name, none where it does not
    train. With TP 2, DP 2, PP 2 and four layers, laid out as in `writers_of`:

        layers.1 linear_proj, cut by TP, to 0       from 0 and 1, joined along its columns
        layers.2 linear_proj, cut by TP, to 0       from 4 and 5
        layers.2 input_layernorm, uncut, to 7       from 6

    Everybody walks down one list and waits only for what stands before it in that list: nobody can
    wait in a circle.
    """
    span = world.train.span
    sent: deque[tuple[dist.Work, torch.Tensor]] = deque()
    for assignment in to_controller(shape) if plan is None else plan:
        tensor = assignment.tensor
        holders = holders_of(tensor, shape.num_layers, span, assignment.replica)
        if world.rank == assignment.receiver:
            parts = [_fetch(world, tensor, rank, parameters) for rank in holders]
            yield tensor, merge(tensor, parts)
        elif world.rank in holders:
            shard = parameters[tensor.name].detach().cpu().contiguous()
            sent.append((isend(shard, assignment.receiver, world.control), shard))
            if len(sent) > PENDING:
                _finish_oldest(sent)
    while sent:
        _finish_oldest(sent)


def holders_of(tensor: ParamSpec, num_layers: int, span: RankGrid, replica: int) -> list[int]:
    """The ranks of a replica that together hold a parameter, in the order of its parts."""
    stage = stage_of(tensor, Stages.of(num_layers, span))
    if tensor.axis is None:
        return [span.rank_at(dp=replica, pp=stage)]
    if tensor.cut == "experts":
        # EP ranks that follow each other have all of them; those of this replica, where it can be
        ranks = span.stage_ranks(stage)
        first = ranks.index(span.rank_at(dp=replica, pp=stage))
        return ranks[first // span.ep * span.ep :][: span.ep]
    return [span.rank_at(tp=tp, dp=replica, pp=stage) for tp in range(span.tp)]


def _fetch(
    world: World, tensor: ParamSpec, rank: int, parameters: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    if rank == world.rank:
        return parameters[tensor.name].detach().cpu()
    shape = local_shape(tensor, Shards.of_grid(world.train.span))
    shard = torch.empty(shape, dtype=next(iter(parameters.values())).dtype)
    return recv(shard, rank, world.control)


def _finish_oldest(sent: deque[tuple[dist.Work, torch.Tensor]]) -> None:
    work, _ = sent.popleft()
    work.wait()
