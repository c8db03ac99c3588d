"""What the ranks of one node see of each other without asking the job's store: a small shared file.

Each rank has a place in it: a pulse that it counts up, and a state. It also holds a lock on a byte
of the file. The kernel gives that up when the process ends, however it ends, and a process that it
has forked does not inherit it; so whether a rank lives needs no pulse, no process number, and no
common namespace of them.

The first rank of a node makes the file and hangs its path into the store. When all have opened it,
or when the first one leaves, its name goes; the kernel frees it with the last of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import tempfile
from pathlib import Path

# States of a rank. What is not there yet cannot be missed, and who left in peace is not missed.
COMING = 0
HERE = 1
LEFT = 2
# What the node knows about the job, the worse the higher.
RUNNING = 0
SUSPECTS = 1  # a rank has lost a connection
FAILED = 2  # the store holds the cause
STORE_LOST = 3

FIELD = struct.Struct("=q")
HEAD = FIELD.size  # what the node knows
PLACE = 2 * FIELD.size  # of each rank: pulse, state


class NodeTable:
    """The table of a node, as the rank with the number `place` on it uses it."""

    def __init__(self, path: Path, place: int) -> None:
        """Open the table and take the place. OSError where the file is not to be seen from here."""
        self.path = path
        self._place = place
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._memory = mmap.mmap(self._file, 0)
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        self._write(self._at(place) + FIELD.size, HERE)

    @classmethod
    def make(cls, places: int) -> NodeTable:
        """Make the table of a node of so many ranks, and take its first place."""
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        file, path = tempfile.mkstemp(prefix="r1zero-", dir=folder)
        os.ftruncate(file, HEAD + places * PLACE)
        os.close(file)
        return cls(Path(path), 0)

    def unlink(self) -> None:
        """Take the name away; who has opened it keeps it."""
        with contextlib.suppress(OSError):
            self.path.unlink()

    def beat(self) -> None:
        """Count the own pulse up."""
        at = self._at(self._place)
        self._write(at, self._read(at) + 1)

    def leave(self) -> None:
        """Go in peace."""
        self._write(self._at(self._place) + FIELD.size, LEFT)

    def pulse(self, place: int) -> int:
        return self._read(self._at(place))

    def state(self, place: int) -> int:
        """COMING, HERE or LEFT."""
        return self._read(self._at(place) + FIELD.size)

    def lives(self, place: int) -> bool:
        """Whether the process of another rank that is HERE has not ended."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, place)
        except OSError:  # it holds the lock
            return True
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)
        return False

    @property
    def known(self) -> int:
        """RUNNING, SUSPECTS, FAILED or STORE_LOST."""
        return self._read(0)

    def tell(self, known: int) -> None:
        """Let the ranks of this node know, whoever heard of it first."""
        self._write(0, max(known, self.known))

    def _at(self, place: int) -> int:
        return HEAD + place * PLACE

    def _read(self, at: int) -> int:
        return FIELD.unpack_from(self._memory, at)[0]

    def _write(self, at: int, value: int) -> None:
        FIELD.pack_into(self._memory, at, value)
