"""Ranks on their devices, set up and watched as those of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta

from npu_checks.check import Check, CheckFailed, Figures, Outcome, write_outcome
from r1zero.distributed.groups import World
from r1zero.distributed.npu_environment import set_defaults
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
    if not found:
        raise CheckFailed(
            "the ranks did not find each other", "see the last lines of the output in the JSON"
        )
    return found[0]


def set_variables() -> None:
    """Set the variables that a rank of a run sets; call before a device is opened without
    `in_world`."""
    set_defaults(os.environ, generates=True, wait=TIMEOUT)
