"""Fork servers of reward workers that are forked from a warm rank: a new interpreter would import
sympy again, which costs more than most runs of the tests.

Of the real thing a rank's fork server lacks nothing but the new interpreter, which tests/reward and
every launched run have. A fork takes along no thread but the one that forks; Python's own locks are
made anew, and what gloo has locked is not used there.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence

from r1zero.reward import fork_client, fork_server
from r1zero.reward.functions import REWARD_FUNCTIONS

fork_server.warm_up(REWARD_FUNCTIONS.names())


def fork_from_here() -> None:
    """From now on this process forks its fork servers."""
    fork_client.start = ForkedServer  # type: ignore[assignment]


class ForkedServer:
    """What `fork_client.start` returns, as far as that is used."""

    def __init__(self, names: Sequence[str], control: int) -> None:
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_serve, args=(names, control))
        self._process.start()
        self.pid = self._process.pid

    def wait(self, timeout: float | None = None) -> int:
        """Its status; subprocess.TimeoutExpired when that takes longer, in seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(fork_client.PROGRAM, timeout or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        """Kill it, if it still runs."""
        self._process.kill()


def _serve(names: Sequence[str], control: int) -> None:
    """Be the program, with nothing of the rank's open but `control`."""
    os.dup2(control, 0)
    nothing = os.open(os.devnull, os.O_RDWR)
    # the numbers stay taken: an object that is forgotten here must close nothing of ours
    for number in map(int, os.listdir("/proc/self/fd")):
        if number not in (0, nothing):
            os.dup2(nothing, number)
    sys.argv = ["-c", *names]
    exec(fork_client.PROGRAM, {"__name__": "__main__"})
    os._exit(0)
