"""A rank forked from a process that has imported what all ranks need (os.fork), and how it ends."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from r1zero.distributed.process import end
from r1zero.distributed.spawn import FORWARDED, stand_alone


class ForkedRank:
    """A child of this process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None  # None while it runs; -N after signal N

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        code = self._wait(0)
        assert code is not None, "waited for"
        return code

    def send_signal(self, number: int, /) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def fork(body: Callable[[], int], environment: dict[str, str]) -> ForkedRank:
    """Run `body` in a child with `environment` added to this process's own; what it returns is the
    exit code.

    Nothing here may have opened a device, nor run a thread that holds a lock: a fork has neither.
    """
    sys.stdout.flush()  # or the child would print it, too
    sys.stderr.flush()
    # one that came between the fork and _stop_forwarding would go to the other ranks
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    pid = os.fork()
    if pid == 0:
        _become(body, environment)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    return ForkedRank(pid)


def _become(body: Callable[[], int], environment: dict[str, str]) -> NoReturn:
    code = 1
    try:
        stand_alone()
        _stop_forwarding()
        os.environ.update(environment)
        code = body()
    except BaseException:  # noqa: BLE001 - the edge of the process
        traceback.print_exc()
    end(code)


def _stop_forwarding() -> None:
    for number in FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
