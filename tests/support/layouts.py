"""Several layouts of the trained model in one world of forked ranks, and what its ranks hold, put
together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
from support.multiproc import DEVICE
from support.patience import LONG

from r1zero.distributed.groups import World
from r1zero.distributed.launch import Launch
from r1zero.distributed.placement import Placement, RoleSize, place
from r1zero.models.config import ModelConfig
from r1zero.models.params import ShardIndex, Stages, merge, param_table, stage_of


def layouts_placement(layouts: Mapping[str, RoleSize]) -> Placement:
    """Each layout as a role of its own, which has all ranks."""
    return place(layouts, colocate=True)


def make_layouts(rank: int, size: int, store: object, layouts: Mapping[str, RoleSize]) -> World:
    """The world of these roles."""
    launch = Launch("single", rank, size, 0, (0,) * size, "", 0)
    placement = layouts_placement(layouts)
    return World(launch, placement, DEVICE, timedelta(seconds=LONG), store)


def joined_parts(
    shape: ModelConfig, size: RoleSize, of_ranks: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The whole tensors of a layout from what each of its ranks has of them, by Megatron's name.
    Those that hold the same must hold it to the last bit. What none has, such as the gradient of what
    is not trained, is left out."""
    span = layouts_placement({"layout": size}).roles["layout"]
    stages = Stages.of(shape.num_layers, span)
    found = {}
    for spec in param_table(shape):
        if spec.name not in of_ranks[span.stage_ranks(stage_of(spec, stages))[0]]:
            continue
        parts: dict[int, torch.Tensor] = {}
        for rank in span.stage_ranks(stage_of(spec, stages)):
            part = of_ranks[rank][spec.name]
            first = parts.setdefault(ShardIndex.of_rank(span, rank).of(spec), part)
            assert torch.equal(first, part), f"rank {rank} has another {spec.name}"
        found[spec.name] = merge(spec, [parts[index] for index in sorted(parts)])
    return found
