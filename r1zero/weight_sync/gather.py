"""Gather whole parameters on the controller, one at a time, for export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from r1zero.distributed.collectives import recv, send
from r1zero.distributed.groups import World
from r1zero.models.config import ModelConfig
from r1zero.models.params import ParamSpec, local_shape, merge, param_table, stage_of


def gather_tensors(
    world: World, shape: ModelConfig, parameters: Mapping[str, torch.Tensor]
) -> Iterator[tuple[ParamSpec, torch.Tensor]]:
    """Yield (entry, whole tensor on the CPU) on the controller; nothing elsewhere.

    All train ranks iterate together; `parameters` are this rank's, by name, none
    where it does not train. The first replica sends.
    """
    span = world.train.span
    for tensor in param_table(shape):
        stage = stage_of(tensor, shape.num_layers, span.pp)
        holders = [
            span.rank_at(tp=tp, pp=stage) for tp in range(span.tp if tensor.axis is not None else 1)
        ]
        if world.is_controller:
            yield (
                tensor,
                merge(
                    tensor, [_fetch(world, tensor, span.tp, rank, parameters) for rank in holders]
                ),
            )
        elif world.rank in holders:
            send(parameters[tensor.name].detach().cpu().contiguous(), 0, world.control)


def _fetch(
    world: World, tensor: ParamSpec, tp: int, rank: int, parameters: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    if rank == world.rank:
        return parameters[tensor.name].detach().cpu()
    shard = torch.empty(local_shape(tensor, tp), dtype=next(iter(parameters.values())).dtype)
    return recv(shard, rank, world.control)
