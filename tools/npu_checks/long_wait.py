"""Item `long_wait`: one rank works for longer than HCCL waits for anybody, and nobody dies.

So it is in a run when one rank generates a long response: the others wait on gloo, and meet in a
collective of HCCL only when all have come. npu_check.py sets HCCL_EXEC_TIMEOUT for this item.
"""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from npu_checks.check import Check, CheckFailed, Figures
from npu_checks.world import in_world
from r1zero.distributed.groups import World
from r1zero.distributed.placement import RoleSize

LONGER = 30.0  # seconds that the wait lasts beyond HCCL's limit
SHORT_WAIT = 2.0  # seconds of the small size, which proves nothing about the limit


def run(check: Check) -> Figures:
    """Let the last rank work while the others wait for it."""
    limit = float(os.environ["HCCL_EXEC_TIMEOUT"])
    wait = SHORT_WAIT if check.small else limit + LONGER
    size = check.launch.world_size

    def work(world: World) -> Figures:
        began = time.perf_counter()
        steps = 0
        if world.rank == size - 1:
            steps = keep_busy(world, wait)
        world.barrier()
        waited = time.perf_counter() - began
        total = torch.ones(1, device=world.device.torch)
        dist.all_reduce(total, group=world.roles["all"].groups["all"])
        if int(total) != size:
            raise CheckFailed(
                f"the sum after the wait is {int(total)} instead of {size}",
                "run `--only groups`, and send us the JSON",
            )
        if waited < wait / 2:  # it came later itself, but not so much
            raise CheckFailed(
                f"rank {world.rank} of {size} waited {waited:.1f} s instead of {wait:g} s: the barrier of the "
                "control plane let it through",
                "send us the JSON",
            )
        line = f"{size - 1} ranks waited {waited:.1f} s on gloo and then summed over HCCL"
        if check.small:
            line += f"; HCCL's limit is {limit:g} s, so this short wait says nothing about it"
        else:
            line += f", past HCCL's limit of {limit:g} s"
        return Figures(line, {"waited": waited, "limit": limit, "products": steps})

    return in_world(check, {"all": RoleSize(size)}, work)


def keep_busy(world: World, seconds: float) -> int:
    """Multiply matrices on the device for a while; how many."""
    x = torch.eye(512, device=world.device.torch)
    steps = 0
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        x = x @ x
        world.device.synchronize()
        steps += 1
    return steps
