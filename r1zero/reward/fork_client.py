"""A fork server as the pool holds it: forks and kills its workers, and tells how they ended.

Nothing here blocks but `close`, which takes as long as processes take to be killed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Sequence

from r1zero.distributed.shutdown import SIGNALS
from r1zero.reward.fork_server import MESSAGE_BYTES, PROGRAM

END_SECONDS = 5.0  # for a fork server to kill its workers, before it is killed itself


def start(names: Sequence[str], control: int) -> subprocess.Popen[bytes]:
    """Start the program of a fork server that is given orders at this descriptor.

    A new interpreter, since a fork of a process with torch's threads may hang; the environment is
    inherited.
    """
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *names],
        stdin=control,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


class ForkClient:
    """A process that forks workers; the caller gives them their numbers."""

    def __init__(self, names: Sequence[str]) -> None:
        """`names` of the reward functions, of which the built-in ones are imported once."""
        self._unsent: deque[tuple[bytes, list[int]]] = deque()  # orders, and pipes for the worker
        self._has_forked = False
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        # A scheduler signals all processes of a job; our end is the workers' end, so they take none.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._process = start(names, theirs.fileno())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    def fileno(self) -> int:
        """What has something to read when there is news."""
        return self._control.fileno()

    def fork(self, number: int) -> tuple[int, int]:
        """Have a worker forked; return where to write to it and where to read from it."""
        inbox, inlet = os.pipe()
        outlet, outbox = os.pipe()
        os.set_blocking(inlet, False)
        os.set_blocking(outlet, False)
        self._send({"fork": number}, [inbox, outbox])
        return inlet, outlet

    def kill(self, number: int) -> None:
        """Have a worker killed; one that has ended stays so."""
        self._send({"kill": number}, [])

    def news(self) -> dict[str, int] | None:
        """Return the next news of a worker, its "pid" or the "status" that it ended with; None if
        there is none. EOFError when the fork server has ended."""
        try:
            body = self._control.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            body = b""
        if not body:
            raise EOFError
        self._has_forked = True
        news: dict[str, int] = json.loads(body)
        return news

    def flush(self) -> None:
        """Send what the socket takes; the rest is for the next time."""
        while self._unsent:
            body, pipes = self._unsent[0]
            try:
                socket.send_fds(self._control, [body], pipes)
            except BlockingIOError:
                return
            except ConnectionError:
                pass  # it is dead, which its news will tell
            self._forget_first()

    def close(self) -> int:
        """End the fork server and all its workers; return its status."""
        while self._unsent:
            self._forget_first()
        self._control.close()
        try:
            if self._has_forked:
                self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            pass  # stopped, or short of a processor; the kernel kills its workers with it
        self._process.kill()
        return self._process.wait()

    def _send(self, order: dict[str, int], pipes: list[int]) -> None:
        self._unsent.append((json.dumps(order).encode("ascii"), pipes))
        self.flush()

    def _forget_first(self) -> None:
        _, pipes = self._unsent.popleft()
        for pipe in pipes:
            os.close(pipe)  # the worker has its own
