"""The fork server of a pool: a process with everything imported, which forks the workers.

    pool -- fork 7, with ends of two pipes --> fork server -- fork --> worker 7
    pool <-- 7 has this pid; 7 has ended with this status -- fork server

Importing sympy takes half a second. Here that is paid once, also for the workers that take the
place of killed ones. The process has one thread and runs no code of the user's, which might start
some: a fork takes along only the thread that forks, and what another one has locked stays locked.

Its end is the end of its workers. It ends with the pool's process, however that dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence

from r1zero.config.own_code import is_own
from r1zero.errors import BadInput
from r1zero.reward.loaded import load_function
from r1zero.reward.worker import PATH_OF_PROGRAMS, self_test, serve

PROGRAM = f"{PATH_OF_PROGRAMS}; from r1zero.reward.fork_server import main; main()"
MESSAGE_BYTES = 256  # more than any has
PR_SET_PDEATHSIG = 1  # prctl(2)


class ForkServer:
    """The running workers of a pool, by the numbers that it gave them."""

    def __init__(self, control: socket.socket) -> None:
        """`control` keeps messages apart (SOCK_SEQPACKET)."""
        self._control = control
        self._running: dict[int, int] = {}  # process ids by number; ours until we wait for them
        self._pid = os.getpid()
        # The interpreter writes a byte when a worker has ended.
        self._ended, self._ending = os.pipe()
        os.set_blocking(self._ending, False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._ending, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])

    def run(self) -> tuple[int, int] | None:
        """Serve the pool. Returns None when the pool is gone, and in each worker its two pipes, to
        read and to write."""
        control = self._control.fileno()
        while True:
            ready, _, _ = select.select([control, self._ended], [], [])
            if self._ended in ready:
                os.read(self._ended, 1 << 16)
                self._tell_ended()
            if control not in ready:
                continue
            order, pipes = self._receive()
            if order is None:
                self._kill_all()
                return None
            if "kill" in order:
                self._kill(order["kill"])
            elif self._fork(order["fork"], pipes):
                return pipes[0], pipes[1]

    def _receive(self) -> tuple[dict[str, int] | None, list[int]]:
        """The next order and the pipes that come with it; None when the pool is gone."""
        try:
            body, pipes, _, _ = socket.recv_fds(
                self._control, MESSAGE_BYTES, 2, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:
            return None, []
        if body:
            return json.loads(body), pipes
        return None, []

    def _fork(self, number: int, pipes: list[int]) -> bool:
        """Fork a worker; True in the worker."""
        pid = os.fork()
        if pid == 0:
            self._leave()
            return True
        # A worker must hold no pipe of another: its end would not be seen.
        for pipe in pipes:
            os.close(pipe)
        self._running[number] = pid
        self._tell({"worker": number, "pid": pid})
        return False

    def _leave(self) -> None:
        """Let a worker be no part of the fork server, but end with it."""
        self._control.close()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(self._ended)
        os.close(self._ending)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._pid:
            os._exit(1)  # it ended before we asked to end with it

    def _kill(self, number: int) -> None:
        """Kill a worker, if it still runs."""
        if number in self._running:
            os.kill(self._running[number], signal.SIGKILL)

    def _kill_all(self) -> None:
        for pid in self._running.values():
            os.kill(pid, signal.SIGKILL)
        for pid in self._running.values():
            os.waitpid(pid, 0)

    def _tell_ended(self) -> None:
        """Tell the pool which workers have ended, and how."""
        for number, pid in list(self._running.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self._running[number]
                self._tell({"worker": number, "status": os.waitstatus_to_exitcode(status)})

    def _tell(self, news: dict[str, int]) -> None:
        with contextlib.suppress(ConnectionError):  # the pool is gone, which the next order tells
            self._control.send(json.dumps(news).encode("ascii"))


def warm_up(names: Sequence[str]) -> None:
    """Import what workers need for the built-in ones among these reward functions."""
    gc.disable()  # an import leaves next to nothing to collect
    functions = []
    for name in names:
        if is_own(name):
            continue
        with contextlib.suppress(BadInput):  # a setting that must be given; the workers have it
            functions.append(load_function(name, {}))
    self_test(functions)  # a wrong verdict is told by the workers, who try again
    gc.collect()
    gc.freeze()  # a worker's garbage collector leaves these pages shared
    gc.enable()


def main() -> None:
    """Be a fork server whose pool is at stdin, for the reward functions of the arguments; then, in
    the processes that it forks, a worker."""
    control = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.close(nothing)
    warm_up(sys.argv[1:])
    pipes = ForkServer(control).run()
    if pipes is None:
        return
    inbox, outbox = pipes
    with os.fdopen(inbox, "rb") as orders, os.fdopen(outbox, "wb") as scores:
        serve(orders, scores)


if __name__ == "__main__":
    main()
