"""A notice board in the rendezvous store, for progress that is only shown: no rank waits for it."""

from __future__ import annotations

import torch.distributed as dist

PREFIX = "r1zero/board/"


class Board:
    """Notices in the job's store; the newest of each name counts."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def post(self, name: str, text: str) -> None:
        """Put a notice up in place of the last one of this name."""
        self._store.set(PREFIX + name, text)

    def read(self, name: str) -> str | None:
        """The notice of this name, if there is one."""
        key = PREFIX + name
        if self._store.check([key]):
            return self._store.get(key).decode()
        return None
