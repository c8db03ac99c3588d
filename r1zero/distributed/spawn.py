"""Start the ranks of one node, as torchrun does, and leave with their exit code.

    python r1zero/distributed/spawn.py --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr HOST
        --master-port 29500 PROGRAM [argument ...]

Three things are different from torchrun, which every rank can be started with as well. Asked to
leave (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1), the ranks get all the time that their step and their
checkpoint take, where torchrun kills after 30 s. The exit code is the ranks' own: 75 after an early
leave, 2 for bad input. And a rank that fails is not buried under a traceback of the launcher: the
rank has said its one sentence.

Here each rank is a new interpreter, of any program. r1zero/node.py, which launch.sh runs, forks them.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
POLL_SECONDS = 0.1
# Ranks end by themselves within seconds of the first that fails, since it tells them. One that is
# stuck in a call of a driver does not.
GRACE_SECONDS = 60.0
PR_SET_PDEATHSIG = 1  # prctl(2)
BAD_INPUT = 2


class Process(Protocol):
    """What of subprocess.Popen is used here."""

    returncode: int | Any

    def poll(self) -> int | None:
        """Its exit code, -N after signal N; None while it runs."""

    def send_signal(self, sig: int, /) -> None:
        """Send it a signal, if it still runs."""


class Ranks:
    """The processes of this node."""

    def __init__(self) -> None:
        self._processes: list[Process] = []

    def start(
        self, begin: Callable[[dict[str, str]], Process], environments: Sequence[dict[str, str]]
    ) -> None:
        """Let `begin` start a process for each environment, which adds to this process's own."""
        for environment in environments:
            self._processes.append(begin(environment))

    def send(self, number: int) -> None:
        """Send a signal to the ranks that still run."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Wait for all; returns their exit code.

        That is the code of the first rank that did not end with 0, but BAD_INPUT if any rank ended
        with it: the others then only followed.
        """
        first = 0
        failed_at = 0.0
        while self._running():
            if first == 0 and (first := self._failed_code()):
                failed_at = time.monotonic()
            if first and time.monotonic() - failed_at > GRACE_SECONDS:
                self.send(signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        if any(process.returncode == BAD_INPUT for process in self._processes):
            return BAD_INPUT
        return first or self._failed_code()

    def _running(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def _failed_code(self) -> int:
        """The code of a rank that ended with another than 0, as a shell gives it: 128 + N after
        signal N."""
        for process in self._processes:
            code = process.poll()
            if code:
                if code > 0:
                    return code
                return 128 - code
        return 0


def main(arguments: Sequence[str]) -> int:
    """Run the ranks of this node; returns the exit code."""
    args = parse(arguments)
    if problem := port_problem(args):
        print(f"r1zero: {problem}", file=sys.stderr)
        return BAD_INPUT

    def begin(environment: dict[str, str]) -> Process:
        return subprocess.Popen(
            [sys.executable, *args.program],
            env=os.environ | environment,
            preexec_fn=stand_alone,
        )

    ranks = Ranks()
    forward_signals(ranks)
    ranks.start(begin, rank_environments(args))
    return ranks.wait()


def parse(arguments: Sequence[str], counted: bool = True) -> argparse.Namespace:
    """Read the command line; `counted` if it must say how many ranks a node has."""
    parser = argparse.ArgumentParser(
        prog=os.path.basename(sys.argv[0]), description="Start the ranks of one node."
    )
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--nproc-per-node", type=int, required=counted)
    parser.add_argument("--master-addr", default="127.0.0.1")
    parser.add_argument("--master-port", help="default on one node a free one")
    parser.add_argument("program", nargs=argparse.REMAINDER)
    args = parser.parse_args(arguments)
    if args.nnodes > 1 and args.master_port is None:
        parser.error("several nodes need --master-port")
    return args


def port_problem(args: argparse.Namespace) -> str | None:
    """What is wrong with the port that was given, if one was."""
    text = args.master_port
    if text is None:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        return f"MASTER_PORT={text} must be from 1 to 65535"
    if args.node_rank == 0 and not is_free(int(text)):
        return (
            f"MASTER_PORT={text} is in use on this node; set another, or leave it unset "
            "for a run on one node"
        )
    return None


def rank_environments(args: argparse.Namespace) -> list[dict[str, str]]:
    """torchrun's variables for each rank of this node, on a free port if none was given.

    Node 1 of 2 with 4 ranks each: local ranks 0 to 3 are ranks 4 to 7 of 8.
    """
    port = args.master_port or free_port()
    size = args.nnodes * args.nproc_per_node
    first = args.node_rank * args.nproc_per_node
    return [
        {
            "RANK": str(first + local_rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(args.nproc_per_node),
            "MASTER_ADDR": args.master_addr,
            "MASTER_PORT": str(port),
        }
        for local_rank in range(args.nproc_per_node)
    ]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def is_free(port: int) -> bool:
    """Whether rank 0 could listen on this port."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except OSError:
            return False
    return True


def forward_signals(ranks: Ranks) -> None:
    """From now on, what asks this process to leave asks the ranks."""
    for number in FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup: the ranks ignore it, too
            signal.signal(number, _forward_to(ranks))


def _forward_to(ranks: Ranks) -> Callable[[int, FrameType | None], None]:
    told: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        ranks.send(number)
        if number == signal.SIGINT and not told:
            told.append(number)
            with contextlib.suppress(OSError):  # of a terminal that is closed
                print(
                    "\nr1zero: leaving after the running step; Ctrl-C again ends at once",
                    file=sys.stderr,
                )

    return forward


def stand_alone() -> None:
    """Be a rank, in a session of its own: a terminal sends Ctrl-C to all processes in its foreground,
    and ranks get it once, from their parent.

    When that is killed the rank is asked to leave: nobody else could reach it any more.
    """
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
