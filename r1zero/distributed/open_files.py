"""Open files of a rank: its connections to other ranks count, and a shell's limit is often 1,024.

A rank raises its own limit to what the system allows. What it needs, seen on worlds of up to 128
ranks and rounded up:

    rank 0            2 a rank: the store, which rank 0 holds unless torchrun does, and gathering;
                      + 200 of its own
    others            1 a rank, since every two ranks of the world are connected; + 200 of its own
    torchrun's agent  1 a rank, on the first node, where it holds the store; + 100 of its own. It
                      keeps the limit of the shell that it was started from
"""

from __future__ import annotations

import contextlib
import os
import resource

OWN_OF_RANK = 200
OWN_OF_AGENT = 100
UNLIMITED = 1 << 30


def raise_limit() -> None:
    """Allow this process as many open files as it may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems say unlimited and mean less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def needed(world_size: int, of_rank_0: bool) -> int:
    """Open files of a rank."""
    return (2 if of_rank_0 else 1) * world_size + OWN_OF_RANK


def needed_by_agent(world_size: int) -> int:
    """Open files of torchrun's agent on the first node."""
    return world_size + OWN_OF_AGENT


def most_allowed() -> int:
    """How many open files this process may allow itself."""
    return _count(resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def allowed_launcher() -> int:
    """How many open files the process has that started this one."""
    return _count(resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)[0])


def _count(limit: int) -> int:
    if limit == resource.RLIM_INFINITY:
        return UNLIMITED
    return limit
