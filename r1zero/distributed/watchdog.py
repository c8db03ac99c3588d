"""The watchdog over failures: one rank fails, all stop, and the job shows one cause.

A rank that fails writes its cause into the job's store; a watcher thread in every other rank sees
it within a second or two and ends the process, even if its main thread is stuck in a collective.

A rank that is killed writes nothing. So every watcher also counts up a pulse in the store and looks
at that of the next rank: when it stands still, that rank is the cause.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch.distributed as dist

from r1zero.distributed.shutdown import BAD_INPUT

KEY = "r1zero/failed"
CLAIMS = "r1zero/failure_claims"
PULSE = "r1zero/pulse/{}"
NAME = "r1zero/name/{}"
POLL_SECONDS = 1.0
# How many looks in a row may show no pulse. A busy machine, or a long call that holds Python's
# lock, must not look dead; nor must ranks that were all suspended for a while, so looks are counted
# and not
# seconds.
SILENT_POLLS = 30
# How long a rank that lost its peer waits for the peer to say why; and rank 0, which may hold the
# store, stays for others to read.
GRACE_SECONDS = 5.0

log = logging.getLogger("r1zero")


def is_lost_connection(error: BaseException) -> bool:
    """Whether this is what a rank gets when another one is gone: the type tells, and of gloo its
    prefix.

    gloo throws a plain RuntimeError whose text begins with its source file,
    "[.../gloo/transport/...] Connection closed by peer"; with "enforce fail" it is the machine's
    own trouble.
    """
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    text = str(error)
    from_backend = isinstance(error, dist.DistBackendError) or "/gloo/" in text.partition("]")[0]
    words = ("connection", "socket", "peer", "timed out", "timeout")
    return (
        isinstance(error, RuntimeError)
        and from_backend
        and "enforce fail" not in text
        and any(word in text.lower() for word in words)
    )


class FailureWatch:
    """Watches for failures of other ranks, and tells them of ours."""

    def __init__(
        self, store: dist.Store, rank: int, node_of_rank: Sequence[int], roles: str
    ) -> None:
        """Start watching. `node_of_rank` has an entry for each rank of the world."""
        self._store = store
        self._rank = rank
        self._size = len(node_of_rank)
        self._name = f"rank {rank} ({roles})"
        # Who tells the cause when the store is gone, and with it perhaps all of rank 0's node.
        elsewhere = (other for other, node in enumerate(node_of_rank) if node != node_of_rank[0])
        self._tells_last = rank == next(elsewhere, 1)
        store.set(NAME.format(rank), self._name)
        self._missed = 0  # polls since the store last answered
        self._failing = threading.Event()
        self._left = threading.Event()
        self.before_exit: Callable[[], None] | None = None  # the last that this process does
        self._thread = threading.Thread(target=self._watch, name="failure-watch", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="failure-guard", daemon=True).start()

    def stop(self) -> None:
        """End the watch; call before leaving the world in peace."""
        self._failing.set()
        self._left.set()
        self._thread.join()

    def end_process(self, error: BaseException, exit_code: int = 1) -> NoReturn:
        """Tell the other ranks, show the cause if it is ours, and end this process.

        Leaves without cleaning up: a rank in the middle of a collective cannot.
        """
        if exit_code == BAD_INPUT:
            log.error("refused: %s", error)
        elif log.handlers:
            log.error("failed", exc_info=error)
        else:  # before there is a log, the traceback must not be lost
            traceback.print_exception(error)
        cause = self._claim(error, exit_code)
        if cause is not None:
            print(f"r1zero: {cause}", file=sys.stderr, flush=True)
        self._exit(exit_code)

    def _claim(self, error: BaseException, exit_code: int) -> str | None:
        """Publish the cause, and return it; None when another rank's failure came first.

        A broken connection is a consequence, so its rank waits a moment for the one who knows the
        cause, and otherwise tells whose pulse has stopped.
        """
        self._failing.set()
        consequence = is_lost_connection(error)
        # without gloo's source line
        said = str(error).split(". This is typically")[0].rpartition("] ")[2]
        try:
            if consequence:
                silent = self._silent(GRACE_SECONDS)
            else:
                silent = []
            cause = f"{self._name} failed: {type(error).__name__}: {error}"
            if exit_code == BAD_INPUT:
                cause = str(error)
            elif silent:
                cause = f"{' and '.join(silent)} ended without a word (killed, or out of memory?)"
            elif consequence:
                cause = f"{self._name} lost the connection to another rank: {said}"
            if self._publish(cause):
                return cause
            return None
        except RuntimeError:
            return self._store_lost(said)

    def _publish(self, cause: str) -> bool:
        """Let all ranks know; False when another cause is known already."""
        if self._store.add(CLAIMS, 1) > 1:
            return False
        self._store.set(KEY, cause)
        return True

    def _silent(self, seconds: float) -> list[str]:
        """Names of the other ranks that show no pulse for so long; none as soon as a cause is
        known."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        before = {rank: self._pulse(rank) for rank in others}
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._store.check([KEY]):
                return []
            self._store.add(PULSE.format(self._rank), 1)
            time.sleep(0.2)
        return [
            self._store.get(NAME.format(rank)).decode()
            for rank in others
            if self._pulse(rank) == before[rank]
        ]

    def _pulse(self, rank: int) -> int:
        return self._store.add(PULSE.format(rank), 0)

    def _store_lost(self, said: str) -> str | None:
        """What one of those left must say when the store went down with rank 0; None on the
        others."""
        cause = "rank 0 or its node ended without a word (killed, or out of memory?)"
        if self._tells_last:
            return f"{cause}: {self._name} says {said}"
        return None

    def _watch(self) -> None:
        following = (self._rank + 1) % self._size
        last = -1
        silent = 0
        while not self._failing.wait(POLL_SECONDS):
            try:
                self._store.add(PULSE.format(self._rank), 1)
                pulse = self._pulse(following)
                failed = self._store.check([KEY])
            except RuntimeError:
                # the main thread will notice too, and knows more; if not, the guard ends this
                continue
            self._missed = 0
            if failed:
                log.error("stopped, because %s", self._store.get(KEY).decode())
                self._exit(1)
            if pulse == last:
                silent = silent + 1
            else:
                silent = 0
            last = pulse
            if silent == SILENT_POLLS:
                name = self._store.get(NAME.format(following)).decode()
                cause = (
                    f"{name} shows no sign of life for {SILENT_POLLS * POLL_SECONDS:.0f} s "
                    "(killed, or its node is gone?)"
                )
                if self._publish(cause):
                    print(f"r1zero: {cause}", file=sys.stderr, flush=True)

    def _guard(self) -> None:
        """End this process when the store does not answer; calls to a lost node wait, without an
        error."""
        while not self._left.wait(POLL_SECONDS):
            self._missed += 1
            if self._missed > SILENT_POLLS:
                said = f"the job's store has not answered for {SILENT_POLLS * POLL_SECONDS:.0f} s"
                log.error("stopped, because %s", said)
                if cause := self._store_lost(said):
                    print(f"r1zero: {cause}", file=sys.stderr, flush=True)
                self._exit(1)

    def _exit(self, code: int) -> NoReturn:
        """End the process; rank 0, whose process may hold the store, only after the others could
        read it."""
        logging.shutdown()
        if self._rank == 0:
            time.sleep(GRACE_SECONDS)
        if self.before_exit is not None:
            self.before_exit()
        os._exit(code)
