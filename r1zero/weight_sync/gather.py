"""Gather whole parameters on the ranks that write them, for export.

Of a layer's experts one comes at a time: all of them together take gigabytes. An expert lies on one
rank of a stage, or on several that hold the same, which need not be in the replica that gives the rest.
"""

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
    single_experts,
    stage_of,
    type_of,
)

PENDING = 4  # shards that a rank has on their way, so that it goes on while receivers write


@dataclass(frozen=True, slots=True)
class Assignment:
    """A whole parameter, or one expert of it, for one rank; from the ranks of one replica, if they
    hold it."""

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
    stages = Stages.of(num_layers, span)
    for number, tensors in enumerate(files):
        turn, replica = divmod(number, span.dp)
        stage = stage_of(tensors[0], stages)
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
    holdings = Holdings(span, shape)
    sent: deque[tuple[dist.Work, torch.Tensor]] = deque()
    for assignment in to_controller(shape) if plan is None else plan:
        tensor = assignment.tensor
        held = holdings.of(tensor)
        holders = holdings.ranks(held, assignment.replica)
        if world.rank == assignment.receiver:
            parts = [_fetch(world, held, holdings.shards, rank, parameters) for rank in holders]
            yield tensor, merge(tensor, parts)
        elif world.rank in holders:
            part = held.take(parameters, holdings.shards)
            sent.append((isend(part, assignment.receiver, world.control), part))
            if len(sent) > PENDING:
                _finish_oldest(sent)
    while sent:
        _finish_oldest(sent)


@dataclass(frozen=True, slots=True)
class Held:
    """A parameter as ranks hold it: its part, or one expert of its part."""

    tensor: ParamSpec
    expert: int | None = None  # one of all experts of its layer; None: all that a rank holds

    def shape(self, shards: Shards) -> tuple[int, ...]:
        """Of what one rank gives."""
        whole = local_shape(self.tensor, shards)
        return whole if self.expert is None else whole[1:]

    def take(self, parameters: Mapping[str, torch.Tensor], shards: Shards) -> torch.Tensor:
        """What this rank gives, on the CPU.

        Of eight experts and EP 4 the expert 5 is the second of the third rank's two.
        """
        part = parameters[self.tensor.name].detach()
        if self.expert is not None:
            part = part[self.expert % (self.tensor.view[0] // shards.ep)]
        return part.cpu().contiguous()


class Holdings:
    """Which train ranks hold what."""

    def __init__(self, span: RankGrid, shape: ModelConfig) -> None:
        self.shards = Shards.of_grid(span)
        self._span = span
        self._stages = Stages.of(shape.num_layers, span)
        self._stage_ranks = [span.stage_ranks(stage) for stage in range(span.pp)]
        self._singles: dict[str, Held] = {}
        for tensor in param_table(shape):
            for number, single in enumerate(single_experts(tensor)):
                self._singles[single.name] = Held(tensor, number)

    def of(self, tensor: ParamSpec) -> Held:
        """Where a parameter, or a single expert, is found."""
        return self._singles.get(tensor.name) or Held(tensor)

    def ranks(self, held: Held, replica: int) -> list[int]:
        """The ranks that together hold it, in the order of its parts."""
        tensor = held.tensor
        stage = stage_of(tensor, self._stages)
        if held.expert is not None:
            part = held.expert * self.shards.ep // tensor.view[0]
            return [self._expert_ranks(stage, replica)[part]]
        if tensor.axis is None:
            return [self._span.rank_at(dp=replica, pp=stage)]
        if tensor.cut == "experts":
            return self._expert_ranks(stage, replica)
        return [self._span.rank_at(tp=tp, dp=replica, pp=stage) for tp in range(self.shards.tp)]

    def _expert_ranks(self, stage: int, replica: int) -> list[int]:
        """The EP ranks, which follow each other, that have all experts of a stage; of this replica,
        where it can be.

        Of the ranks 0 to 7 with TP 2, DP 4, EP 4, for replica 3, which is 6 and 7: 4 5 6 7.
        """
        ranks = self._stage_ranks[stage]
        place = ranks.index(self._span.rank_at(dp=replica, pp=stage))
        first = place - place % self.shards.ep
        return ranks[first : first + self.shards.ep]


def _fetch(
    world: World, held: Held, shards: Shards, rank: int, parameters: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    if rank == world.rank:
        return held.take(parameters, shards)
    of_model = next(iter(parameters.values())).dtype  # those in fp32 always come last
    part = torch.empty(held.shape(shards), dtype=type_of(held.tensor, of_model))
    return recv(part, rank, world.control)


def _finish_oldest(sent: deque[tuple[dist.Work, torch.Tensor]]) -> None:
    work, _ = sent.popleft()
    work.wait()
