"""The identity of a process: host, pid, start, so that others find out whether it still runs."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NAMESPACE = Path("/proc/self/ns/pid")
GONE = "ZX"  # states of a process whose first thread has ended; others may still write


@dataclass(frozen=True, slots=True)
class Identity:
    """A process, its machine and its job."""

    host: str
    machine: str  # where process numbers mean the same; "" when that is not known
    pid: int
    ticks: int  # since boot, when the process began: tells a number that is used again
    since: float  # seconds since the epoch, by the host's clock; only shown
    job: str  # of Slurm; "" outside of one
    restart: int  # how often Slurm has put that job back into the queue

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, which began at {since}"

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self)) + "\n"

    def is_alive(self) -> bool | None:
        """Whether this process runs; None when that cannot be seen from here."""
        if not self.machine or self.machine != _machine():
            return None
        foreign = False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's, which may be hidden from this one
            foreign = True
        try:
            state, ticks = _state(self.pid)
            ended = state in GONE and len(os.listdir(f"/proc/{self.pid}/task")) < 2
        except OSError:
            return foreign
        return ticks == self.ticks and not ended

    def is_restart_of(self, other: Identity) -> bool:
        """Whether Slurm has started this one in place of the other."""
        return self.job != "" and self.job == other.job and self.restart > other.restart


def mine() -> Identity:
    """This process."""
    pid = os.getpid()
    restart = os.environ.get("SLURM_RESTART_COUNT", "")
    return Identity(
        host=socket.gethostname(),
        machine=_machine(),
        pid=pid,
        ticks=_state(pid)[1],
        since=time.time(),
        job=os.environ.get("SLURM_JOB_ID", ""),
        restart=int(restart) if restart.isdecimal() else 0,
    )


def read(path: Path) -> Identity | None:
    """What `Identity.text` wrote; None when that is not, or not yet, there."""
    try:
        return Identity(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _machine() -> str:
    """This start of this machine, and which of its processes are seen: in a container, its own."""
    try:
        return f"{BOOT_ID.read_text().strip()} {os.readlink(NAMESPACE)}"
    except OSError:
        return ""


def _state(pid: int) -> tuple[str, int]:
    """A process's state, a letter, and when it began. OSError when it cannot be looked at."""
    text = Path(f"/proc/{pid}/stat").read_text()
    fields = text.rpartition(")")[2].split()  # behind the name, which may hold anything
    return fields[0], int(fields[19])
