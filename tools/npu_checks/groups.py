"""Item `groups`: HCCL groups are made in the order of a run, and their collectives give right results.

Every group is made and warmed up as a run does it (r1zero/distributed/groups.py). HCCL connects at the
first collective of a group, and takes twice its buffer of device memory then.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from npu_checks.check import Check, CheckFailed, Figures
from npu_checks.world import in_world, set_variables
from r1zero.distributed import device as devices
from r1zero.distributed.groups import World
from r1zero.distributed.npu_environment import tensor_megabytes
from r1zero.distributed.placement import RoleSize

ADVICE = (
    "look at the links between these devices (`npu-smi info`, `hccn_tool`), and at HCCL_* variables "
    "in the JSON"
)


def run(check: Check) -> Figures:
    """Make the groups, then try every collective on each kind of them."""
    size = check.launch.world_size
    set_variables()
    free = devices.free_gigabytes("npu", [check.launch.local_rank])[0]
    began = time.perf_counter()

    def work(world: World) -> Figures:
        made = {"of the roles": taken(world, began, free)}
        made |= pairs(world)
        numel = 1000 if check.small else 1 << 24
        tried = 0
        for name, group in groups_of(world).items():
            for collective, attempt in COLLECTIVES.items():
                attempt_on(world, name, group, collective, attempt, numel)
                tried += 1
        return figures(made, tried)

    return in_world(check, roles(size), work)


def roles(size: int) -> Mapping[str, RoleSize]:
    """Roles whose groups are those of a run: TP pairs in training, one TP group in rollout."""
    pair = 2 if size % 2 == 0 else 1
    return {
        "train": RoleSize(size, pair),
        "rollout": RoleSize(size, size),
        "ref": RoleSize(size),
    }


def taken(world: World, began: float, free: float) -> dict[str, float]:
    """Seconds since a moment, and the memory of this device that went meanwhile."""
    world.device.synchronize()
    now = devices.free_gigabytes("npu", [world.launch.local_rank])[0]
    return {"seconds": time.perf_counter() - began, "megabytes": (free - now) * 1000}


def pairs(world: World) -> dict[str, dict[str, float]]:
    """Make the groups in which rank 0 would publish to each other rank."""
    found = {}
    for other in range(1, world.size):
        world.barrier()
        free = devices.free_gigabytes("npu", [world.launch.local_rank])[0]
        began = time.perf_counter()
        world.tensor_group([0, other], tensor_megabytes(os.environ))
        found[f"0 {other}"] = taken(world, began, free)
    return found


def groups_of(world: World) -> dict[str, dist.ProcessGroup]:
    """This rank's groups that are tried; every rank has all of these kinds."""
    return {
        "the world": world.train.groups["all"],
        "TP": world.train.groups["tp"],
        "DP": world.train.groups["dp"],
    }


def figures(made: Mapping[str, Mapping[str, float]], tried: int) -> Figures:
    """What rank 0 has seen."""
    own = made["of the roles"]
    others = [group for name, group in made.items() if group is not own]
    slowest = max(group["seconds"] for group in others)
    largest = max(group["megabytes"] for group in others)
    line = (
        f"groups of the roles in {own['seconds']:.1f} s, {own['megabytes']:.0f} MB; a pair in "
        f"at most {slowest:.2f} s, {largest:.0f} MB; {tried} collectives right on every rank"
    )
    return Figures(line, {"groups": made, "collectives": tried})


# -- collectives ----------------------------------------------------------------------------------


def attempt_on(
    world: World,
    name: str,
    group: dist.ProcessGroup,
    collective: str,
    attempt: Callable[[World, dist.ProcessGroup, int], tuple[torch.Tensor, torch.Tensor]],
    numel: int,
) -> None:
    """Run one collective. CheckFailed where an element is wrong on this rank."""
    found, right = attempt(world, group, numel)
    world.device.synchronize()
    wrong = (found != right).nonzero().flatten()
    if len(wrong):
        place = int(wrong[0])
        ranks = dist.get_process_group_ranks(group)
        raise CheckFailed(
            f"{collective} over {name} {ranks}: {len(wrong)} of {found.numel()} elements are wrong, "
            f"the first is {found[place].item()} instead of {right[place].item()}",
            ADVICE,
        )
    world.barrier()


def numbers(world: World, index: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """What the member `index` of a group gives: whole numbers whose sums bf16 holds exactly."""
    pattern = torch.arange(numel, device=world.device.torch) % 3
    return (pattern + index).to(dtype)


def sum_of(
    dtype: torch.dtype,
) -> Callable[[World, dist.ProcessGroup, int], tuple[torch.Tensor, torch.Tensor]]:
    """all_reduce with SUM in a type."""

    def attempt(
        world: World, group: dist.ProcessGroup, numel: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = dist.get_world_size(group)
        x = numbers(world, dist.get_rank(group), numel, dtype)
        dist.all_reduce(x, group=group)
        return x, total(world, size, numel, dtype)

    return attempt


def total(world: World, size: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """The sum of what all members give: pattern + 0, pattern + 1, ..."""
    pattern = numbers(world, 0, numel, torch.float32)
    return (size * pattern + size * (size - 1) // 2).to(dtype)


def largest(
    world: World, group: dist.ProcessGroup, numel: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """all_reduce with MAX, as the sampler uses it."""
    x = numbers(world, dist.get_rank(group), numel, torch.float32)
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x, numbers(world, dist.get_world_size(group) - 1, numel, torch.float32)


def gather(world: World, group: dist.ProcessGroup, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
    """all_gather into a list, as the sampler uses it."""
    size = dist.get_world_size(group)
    mine = numbers(world, dist.get_rank(group), numel, torch.bfloat16)
    parts = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(parts, mine, group=group)
    right = [numbers(world, index, numel, torch.bfloat16) for index in range(size)]
    return torch.cat(parts), torch.cat(right)


def reduce_scatter(
    world: World, group: dist.ProcessGroup, numel: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """reduce_scatter of fp32, as the distributed optimizer uses it."""
    size = dist.get_world_size(group)
    index = dist.get_rank(group)
    whole = numbers(world, index, size * numel, torch.float32)
    part = torch.empty(numel, device=world.device.torch)
    dist.reduce_scatter_tensor(part, whole, group=group)
    return part, total(world, size, size * numel, torch.float32).chunk(size)[index]


def broadcast(
    world: World, group: dist.ProcessGroup, numel: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Broadcast from the last member, as publishing uses it."""
    size = dist.get_world_size(group)
    x = numbers(world, dist.get_rank(group), numel, torch.bfloat16)
    dist.broadcast(x, src=dist.get_process_group_ranks(group)[-1], group=group)
    return x, numbers(world, size - 1, numel, torch.bfloat16)


def ring(world: World, group: dist.ProcessGroup, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Send to the next member and receive from the one before, as a pipeline does."""
    ranks = dist.get_process_group_ranks(group)
    size = len(ranks)
    index = dist.get_rank(group)
    mine = numbers(world, index, numel, torch.bfloat16)
    if size == 1:
        return mine, mine
    before = (index - 1) % size
    got = torch.empty_like(mine)
    pending = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, mine, ranks[(index + 1) % size], group),
            dist.P2POp(dist.irecv, got, ranks[before], group),
        ]
    )
    for work in pending:
        work.wait()
    return got, numbers(world, before, numel, torch.bfloat16)


COLLECTIVES = {
    "the sum in fp32": sum_of(torch.float32),
    "the sum in bf16": sum_of(torch.bfloat16),
    "the sum in int64": sum_of(torch.int64),
    "the maximum in fp32": largest,
    "all_gather": gather,
    "reduce_scatter": reduce_scatter,
    "broadcast": broadcast,
    "send and receive": ring,
}
