"""Item `float64`: sums of statistics over gloo are right after MindSpeed was imported.

MindSpeed replaces torch.distributed.all_reduce by one that loses sums of float64. The control plane
keeps torch's own, and this looks whether it does.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from npu_checks.check import Check, CheckFailed, Figures
from r1zero.distributed.collectives import all_sum
from r1zero.distributed.megatron_on_npu import import_mindspeed
from r1zero.distributed.rendezvous import join

SECONDS = 60.0  # that the ranks may take to meet
TINY = 2.0**-40  # lost where a sum passes through float32


def run(check: Check) -> Figures:
    """Sum a number that float32 does not hold over all ranks."""
    import_mindspeed()
    rank = check.launch.rank
    size = check.launch.world_size
    store = join(check.launch, SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    everyone = dist.group.WORLD
    assert everyone is not None, "just made"
    mine = 1.0 + rank + TINY
    wanted = size * (size + 1) / 2 + size * TINY
    ours = float(all_sum(torch.tensor([mine], dtype=torch.float64), everyone))
    theirs = torch.tensor([mine], dtype=torch.float64)
    dist.all_reduce(theirs, group=everyone)
    dist.destroy_process_group()
    if ours != wanted:
        raise CheckFailed(
            f"the sum of float64 over gloo is {ours!r} on rank {rank} instead of {wanted!r}",
            "something has replaced torch.distributed.all_reduce before r1zero could keep it: "
            "import nothing of MindSpeed earlier, and send us the JSON",
        )
    if float(theirs) == wanted:
        said = "torch.distributed.all_reduce is right, too"
    else:
        said = "MindSpeed's own all_reduce loses it, and is not used for it"
    return Figures(
        f"{size} ranks sum float64 exactly; {said}", {"replaced_is_right": float(theirs) == wanted}
    )
