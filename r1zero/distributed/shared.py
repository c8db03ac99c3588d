"""Whether the file system is shared: a path may lead to another folder on each node.

On NFS a node may for a while believe what it saw before. Listing a folder, and asking for it to be
made once more, lets it ask the server; so every rank does both, for up to half a minute.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

from r1zero.distributed.groups import World
from r1zero.distributed.transfer import RoleTransfer
from r1zero.errors import BadInput

SECONDS = 30.0
POLL_SECONDS = 0.2


def check_shared(world: World, files: Mapping[str, tuple[Path, Path, str]]) -> None:
    """Wait until every rank sees files that rank 0 wrote. Collective. BadInput on all if one fails.

    `files` has, by the key that names a folder, that folder, the file in it and the file's content.
    """
    for key, (folder, path, text) in files.items():
        seen = RoleTransfer(world).all_gather(_sees(path, text))
        if not all(seen):
            blind = next(rank for rank, sees in enumerate(seen) if not sees)
            node = world.launch.node_of_rank[blind]
            if folder.is_absolute():
                relative = ""
            else:
                relative = " by an absolute path"
            raise BadInput(
                f"{key} is not shared: node {node} does not see what rank 0 made in "
                f"{folder}; name a folder that all nodes share{relative}"
            )


def _sees(path: Path, text: str) -> bool:
    """Whether this rank sees the file within the time."""
    deadline = time.monotonic() + SECONDS
    made = []
    while True:
        with contextlib.suppress(OSError):
            made += _make(path.parent)
            os.listdir(path.parent)
            if path.read_text() == text:
                return True
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    for folder in reversed(made):  # of this node alone: nobody wants them
        with contextlib.suppress(OSError):
            folder.rmdir()
    return False


def _make(folder: Path) -> list[Path]:
    """Make a folder and those around it; returns those that seemed missing, outermost first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]
