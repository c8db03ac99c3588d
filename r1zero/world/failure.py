"""One rank fails, all stop, and the job shows one cause.

A rank that fails writes its cause into the job's store; a watcher thread in every other rank sees it
within a second or two and ends the process, even if its main thread is stuck in a collective.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from typing import NoReturn

import torch.distributed as dist

KEY, CLAIMS = "r1zero/failed", "r1zero/failure_claims"
POLL_SECONDS = 1.0
# How long a rank that lost its peer waits for the peer to say why; and rank 0, which may hold the store,
# stays for others to read.
GRACE_SECONDS = 5.0

log = logging.getLogger("r1zero")


class FailureWatch:
    """Watches for failures of other ranks, and tells them of ours."""

    def __init__(self, store: dist.Store, rank: int, roles: str) -> None:
        """Start watching."""
        self._store, self._rank, self._name = store, rank, f"rank {rank} ({roles})"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failure-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch; call before leaving the world in peace."""
        self._done.set()
        self._thread.join()

    def end_process(self, error: BaseException, exit_code: int = 1) -> NoReturn:
        """Tell the other ranks, show the cause if it is ours, and end this process.

        Leaves without cleaning up: a rank in the middle of a collective cannot.
        """
        log.exception("failed")
        cause = self._claim(error)
        if cause is not None:
            print(f"r1zero: {cause}", file=sys.stderr, flush=True)
        self._exit(exit_code)

    def _claim(self, error: BaseException) -> str | None:
        """Publish the cause, and return it; None when another rank's failure came first.

        A broken connection is a consequence, so its rank waits a moment for the one who knows the cause.
        """
        self._done.set()
        consequence = isinstance(error, RuntimeError) and any(
            word in str(error).lower() for word in ("connection", "socket", "peer"))
        deadline = time.monotonic() + (GRACE_SECONDS if consequence else 0.0)
        try:
            while time.monotonic() < deadline and not self._store.check([KEY]):
                time.sleep(0.2)
            if self._store.add(CLAIMS, 1) > 1:
                return None
            cause = f"{self._name} failed: {type(error).__name__}: {error}"
            if consequence:
                said = str(error).split(". This is typically")[0]
                cause = f"{self._name} lost the connection to another rank, which ended without a word " \
                        f"(killed, or out of memory?): {said}"
            self._store.set(KEY, cause)
            return cause
        except RuntimeError:  # the store went down with rank 0; one of those left must say so
            said = str(error).split(". This is typically")[0]
            return f"{self._name} lost the connection to rank 0: {said}" if self._rank == 1 else None

    def _watch(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            try:
                failed = self._store.check([KEY])
            except RuntimeError:
                continue  # the main thread will notice too, and knows more
            if failed:
                log.error("stopped, because %s", self._store.get(KEY).decode())
                self._exit(1)

    def _exit(self, code: int) -> NoReturn:
        """End the process; rank 0, whose process may hold the store, only after the others could read it."""
        logging.shutdown()
        if self._rank == 0:
            time.sleep(GRACE_SECONDS)
        os._exit(code)
