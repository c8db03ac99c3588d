"""Gather whole parameters on the controller, one at a time, for export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from r1zero.distributed.collectives import recv, send
from r1zero.distributed.groups import World
from r1zero.distributed.placement import RankGrid
from r1zero.models.config import ModelConfig
from r1zero.models.params import ParamSpec, local_shape, merge, param_table, stage_of


def gather_tensors(
    world: World, shape: ModelConfig, parameters: Mapping[str, torch.Tensor]
) -> Iterator[tuple[ParamSpec, torch.Tensor]]:
    """Yield (entry, whole tensor on the CPU) on the controller; nothing elsewhere.

    All train ranks iterate together; `parameters` are this rank's, by name, none where it does not
    train. The first replica sends. With TP 2, DP 2, PP 2 and four layers, ranks 0 to 7:

        stage 0, layers 0 1    replica 0: 0 1    replica 1: 2 3
        stage 1, layers 2 3    replica 0: 4 5    replica 1: 6 7

        layers.1 linear_proj, cut by TP     from 0 and 1, joined along its columns
        layers.2 linear_proj, cut by TP     from 4 and 5
        layers.2 input_layernorm, uncut     from 4
    """
    span = world.train.span
    for tensor in param_table(shape):
        holders = holders_of(tensor, shape.num_layers, span)
        if world.is_controller:
            shards = [_fetch(world, tensor, span.tp, rank, parameters) for rank in holders]
            yield tensor, merge(tensor, shards)
        elif world.rank in holders:
            send(parameters[tensor.name].detach().cpu().contiguous(), 0, world.control)


def holders_of(tensor: ParamSpec, num_layers: int, span: RankGrid) -> list[int]:
    """The ranks of the first replica that together hold a parameter, in the order of its parts."""
    stage = stage_of(tensor, num_layers, span.pp)
    if tensor.axis is None:
        return [span.rank_at(pp=stage)]
    return [span.rank_at(tp=tp, pp=stage) for tp in range(span.tp)]


def _fetch(
    world: World, tensor: ParamSpec, tp: int, rank: int, parameters: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    if rank == world.rank:
        return parameters[tensor.name].detach().cpu()
    shard = torch.empty(local_shape(tensor, tp), dtype=next(iter(parameters.values())).dtype)
    return recv(shard, rank, world.control)
