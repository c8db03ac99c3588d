"""Ranks on their devices, set up and watched as those of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta

from npu_checks.check import Check, CheckFailed, Figures, Outcome, write_outcome
from r1zero.distributed.groups import World
from r1zero.distributed.placement import RoleSize, place
from r1zero.distributed.process import run_rank

TIMEOUT = timedelta(minutes=30)


def in_world(
    check: Check, roles: Mapping[str, RoleSize], work: Callable[[World], Figures]
) -> Figures:
    """What `work` returns on this rank, in a world of all ranks of the item, each with every role.

    A rank that fails ends the others within seconds, as in a run.
    """
    found: list[Figures] = []

    def keep(world: World) -> None:
        try:
            found.append(work(world))
        except CheckFailed as failure:  # the watchdog ends this process: tell before
            write_outcome(check, Outcome("FAIL", failure.wrong, failure.advice))
            raise

    run_rank(
        check.launch,
        place(roles, colocate=True),
        TIMEOUT,
        on_cpu=False,
        deterministic=False,
        prepare=lambda world: world,
        work=keep,
    )
    return found[0]


def one_role(check: Check, tp: int = 1) -> dict[str, RoleSize]:
    """All ranks of the item in one role."""
    return {"train": RoleSize(check.launch.world_size, tp)}
