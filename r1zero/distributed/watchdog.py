"""The watchdog over failures: one rank fails, all stop, and the job shows one cause.

A rank that fails writes its cause into the job's store; a watcher thread in every other rank hears
of it within a second or two and ends the process, even if its main thread is stuck in a collective.

A rank that is killed writes nothing. So every watcher also looks at a few others (lookout), and the
one that misses a rank names it.
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

from r1zero.distributed.lookout import (
    KEY,
    NAME,
    NEWS,
    POLL_SECONDS,
    SILENT_POLLS,
    Lookout,
)
from r1zero.distributed.node_table import FAILED, STORE_LOST
from r1zero.distributed.shutdown import BAD_INPUT

CLAIMS = "r1zero/failure_claims"
# How long a rank that lost a connection waits for the one that knows the cause: long enough for a
# node that is gone to be missed.
CAUSE_SECONDS = 12.0
# How long rank 0, which may hold the store, stays for others to read.
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
        self._name = f"rank {rank} ({roles})"
        # Who tells the cause when the store is gone, and with it perhaps all of rank 0's node.
        elsewhere = (other for other, node in enumerate(node_of_rank) if node != node_of_rank[0])
        self._tells_last = rank == next(elsewhere, 1)
        store.set(NAME.format(rank), self._name)
        self._lookout = Lookout(store, rank, node_of_rank)
        self._missed = 0  # polls since the last look was through
        self._failing = threading.Event()
        self._left = threading.Event()
        self._last_words = threading.Lock()  # taken once, by the thread that ends this process
        self.before_exit: Callable[[], None] | None = None  # the last that this process does
        self._thread = threading.Thread(target=self._watch, name="failure-watch", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="failure-guard", daemon=True).start()

    def stop(self) -> None:
        """End the watch; call before leaving the world in peace."""
        self._failing.set()
        self._left.set()
        self._thread.join()
        self._lookout.leave()

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
        # without gloo's source line
        said = str(error).split(". This is typically")[0].rpartition("] ")[2]
        try:
            if is_lost_connection(error):
                self._wait_for_cause()
                cause = f"{self._name} lost the connection to another rank: {said}"
            elif exit_code == BAD_INPUT:
                cause = str(error)
            else:
                cause = f"{self._name} failed: {type(error).__name__}: {error}"
            self._failing.set()
            self._publish(cause)
        except RuntimeError:
            self._failing.set()
            self._tell_of_lost_store(said)
        self._exit(exit_code)

    def _wait_for_cause(self) -> None:
        """A broken connection is a consequence: wait for the one who knows the cause. The watch goes
        on meanwhile, with its pulses, and ends this process when there is one."""
        self._lookout.suspect()
        time.sleep(CAUSE_SECONDS)

    def _publish(self, cause: str) -> None:
        """Let all ranks know, and show it, unless another cause is known already."""
        if self._store.add(CLAIMS, 1) > 1:
            return
        self._store.set(KEY, cause)
        print(f"r1zero: {cause}", file=sys.stderr, flush=True)
        self._store.add(NEWS, 1)
        self._lookout.tell(FAILED)

    def _tell_of_lost_store(self, said: str) -> None:
        """What one of those left must say when the store went down with rank 0."""
        self._lookout.tell(STORE_LOST)
        if self._tells_last and self._last_words.acquire(blocking=False):
            cause = "rank 0 or its node ended without a word (killed, or out of memory?)"
            print(f"r1zero: {cause}: {self._name} says {said}", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        while not self._failing.wait(POLL_SECONDS):
            try:
                cause = self._lookout.look()
                if cause is not None:
                    self._publish(cause)
            except RuntimeError as error:
                log.debug("the job's store refused: %s", error)
            self._missed = 0
            if self._failing.is_set():
                return  # the main thread knows a cause of its own
            if self._lookout.known == FAILED:
                self._stop_because_of_others()
            if self._lookout.known == STORE_LOST:
                self._end_without_store("the job's store is gone")

    def _stop_because_of_others(self) -> NoReturn:
        try:
            cause = self._store.get(KEY).decode()
        except RuntimeError:
            cause = "another rank has failed, and the job's store is gone"
        log.error("stopped, because %s", cause)
        self._exit(1)

    def _guard(self) -> None:
        """End this process when the store does not answer; calls to a lost node wait, without an
        error."""
        while not self._left.wait(POLL_SECONDS):
            self._missed += 1
            if self._missed > SILENT_POLLS:
                self._end_without_store(
                    f"the job's store has not answered for {SILENT_POLLS * POLL_SECONDS:.0f} s"
                )

    def _end_without_store(self, said: str) -> NoReturn:
        log.error("stopped, because %s", said)
        self._tell_of_lost_store(said)
        self._exit(1)

    def _exit(self, code: int) -> NoReturn:
        """End the process; rank 0, whose process may hold the store, only after the others could
        read it."""
        logging.shutdown()
        if self._rank == 0:
            time.sleep(GRACE_SECONDS)
        if self.before_exit is not None:
            self.before_exit()
        self._lookout.leave()
        os._exit(code)
