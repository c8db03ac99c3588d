"""The lookout of a rank: once a second it shows a sign of life, and looks at those of a few others.

On a node the ranks see each other in a table of their own (node_table): its first rank looks at all
others there, and they at it. The first ranks of the nodes also count up a pulse in the job's store,
and each looks at that of the next node's. So a process that ends is missed within seconds by
somebody who knows that it did, and a node that is gone within 30 looks; if any rank has lost a
connection meanwhile, within 6.

Calls to the store, each second: three of a node, whatever happens (own pulse, the next one's, news).
With 16 ranks a node that is 192 at 1,024 ranks and 1,920 at 10,240, where a store serves some
30,000 to 50,000. After a death every node adds a few calls, once; nobody asks for all pulses.

A rank that does not see the table of its node, as in a container of its own, has its pulse in the
store, and the first rank of the node looks at it there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from r1zero.distributed.node_table import (
    FAILED,
    HERE,
    LEFT,
    RUNNING,
    STORE_LOST,
    SUSPECTS,
    NodeTable,
)

POLL_SECONDS = 1.0
# How many looks in a row may show no pulse. A busy machine, or a long call that holds Python's
# lock, must not look dead; nor must ranks that were all suspended for a while, so looks are counted
# and not seconds.
SILENT_POLLS = 30
# The same, of another node, when a connection is lost somewhere.
SUSPECT_POLLS = 6
# How many looks in a row find a process ended, so that one that is ended on purpose, as by Ctrl-C
# on all ranks, is not named by the one that ends last.
GONE_POLLS = 3
# How many looks in a row the store may refuse.
REFUSED_POLLS = 3

# How long a rank waits at first for the table of its node.
OPEN_SECONDS = 10.0

KEY = "r1zero/failed"  # the cause
NEWS = "r1zero/news"  # not 0: there is a cause, or a connection is lost
PULSE = "r1zero/pulse/{}"
NAME = "r1zero/name/{}"
TABLE = "r1zero/node_table/{}"  # path of the table, by its first rank
APART = "r1zero/apart/{}"  # is there for a rank that does not see the table


@dataclass(slots=True)
class Seen:
    """What was seen of another rank."""

    pulse: int = -1
    silent: int = 0  # looks in a row that showed no pulse
    gone: int = 0  # looks in a row that found the process ended

    def note(self, pulse: int) -> None:
        self.silent = self.silent + 1 if pulse == self.pulse else 0
        self.pulse = pulse


class Lookout:
    """What one rank shows and sees. Not for several threads, but for `suspect` and `tell`."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        node_of_rank: Sequence[int],
        tables: type[NodeTable] = NodeTable,
    ) -> None:
        """`node_of_rank` has an entry for each rank of the world."""
        self._store = store
        self._rank = rank
        self._tables = tables
        firsts: dict[int, int] = {}  # the first rank of each node
        for other, node in enumerate(node_of_rank):
            firsts.setdefault(node, other)
        mine = node_of_rank[rank]
        self._local = [other for other, node in enumerate(node_of_rank) if node == mine]
        self._first = firsts[mine]
        self._leads = rank == self._first
        ring = list(firsts.values())
        self._next = ring[(ring.index(self._first) + 1) % len(ring)]
        self._table: NodeTable | None = None
        self._apart: set[int] = set()  # local ranks, perhaps this one, that do not see the table
        self._unlinked = False
        self._has_told = False  # the store, that this node suspects something
        self._suspected = False  # by any node
        self._refused = 0
        self.known = RUNNING
        watched = [self._first]
        if self._leads:
            watched = [*self._local, self._next]
        self._seen = {other: Seen() for other in watched if other != rank}
        if self._leads:
            self._make_table()
        else:
            # From now on this rank can be missed. All have come (rendezvous), so it is not long.
            with contextlib.suppress(RuntimeError):
                store.wait([TABLE.format(self._first)], timedelta(seconds=OPEN_SECONDS))
            self._open_table()

    def look(self) -> str | None:
        """Show a sign of life and look at the others; returns the cause if one of them is gone.

        `known` is then what is known of the job. RuntimeError when the store refuses, which makes
        it STORE_LOST if it goes on.
        """
        try:
            if not self._leads and self._table is None and self._rank not in self._apart:
                self._open_table()
            self._show()
            self._hear()
            cause = self._missing() if self.known < FAILED else None
        except RuntimeError:
            self._refused += 1
            if self._refused == REFUSED_POLLS:
                self.tell(STORE_LOST)
            raise
        self._refused = 0
        return cause

    def suspect(self) -> None:
        """A connection was lost: let all nodes be less patient. RuntimeError without a store."""
        if self._table is not None:
            self._table.tell(SUSPECTS)
        else:
            self._store.add(NEWS, 1)

    def tell(self, known: int) -> None:
        """Know this from now on, and let the ranks of this node know."""
        self.known = max(known, self.known)
        if self._table is not None:
            self._table.tell(known)

    def leave(self) -> None:
        """Leave in peace, not to be missed."""
        if self._table is not None:
            self._table.leave()
            self._table.unlink()

    # -- showing and hearing -----------------------------------------------------------------------

    def _make_table(self) -> None:
        path = Path()
        with contextlib.suppress(OSError):  # no room: then all are apart
            self._table = self._tables.make(len(self._local))
            path = self._table.path
        self._store.set(TABLE.format(self._first), str(path))

    def _open_table(self) -> None:
        if not self._store.check([TABLE.format(self._first)]):
            return
        path = Path(self._store.get(TABLE.format(self._first)).decode())
        try:
            self._table = self._tables(path, self._local.index(self._rank))
        except OSError:
            self._apart.add(self._rank)
            self._store.set(APART.format(self._rank), "")

    def _show(self) -> None:
        if self._table is not None:
            self._table.beat()
        if self._leads or self._table is None:
            self._store.add(PULSE.format(self._rank), 1)

    def _hear(self) -> None:
        """Learn what is known of the job."""
        if self._table is not None:
            self.known = max(self.known, self._table.known)
        if not self._leads and self._table is not None:
            return
        if self.known == SUSPECTS and not self._has_told:
            self._has_told = True
            self._store.add(NEWS, 1)
        if self._store.add(NEWS, 0) > 0:
            self._suspected = True
            if self._store.check([KEY]):
                self.tell(FAILED)

    # -- looking -----------------------------------------------------------------------------------

    def _missing(self) -> str | None:
        """The cause, if one of those that this rank looks at is gone."""
        gone = []
        silent = []
        for other, seen in self._seen.items():
            is_local = other in self._local
            patience = SUSPECT_POLLS if self._suspected else SILENT_POLLS
            if is_local and self._table is not None and not self._is_apart(other):
                self._look_here(other, seen, self._table)
                if self._table.state(self._local.index(other)) == HERE:
                    patience = SILENT_POLLS  # that it lives is known
            else:
                seen.note(self._store.add(PULSE.format(other), 0))
            if seen.gone >= GONE_POLLS:
                gone.append(other)
            elif seen.silent >= patience:
                silent.append(other)
        self._unlink()
        if gone:
            return f"{self._names(gone)} ended without a word (killed, or out of memory?)"
        if silent:
            seconds = self._seen[silent[0]].silent * POLL_SECONDS
            return (
                f"{self._names(silent)} shows no sign of life for {seconds:.0f} s "
                "(killed, or its node is gone?)"
            )
        return None

    def _look_here(self, other: int, seen: Seen, table: NodeTable) -> None:
        """Look at a rank of this node in the table."""
        place = self._local.index(other)
        state = table.state(place)
        if state == LEFT:
            seen.silent = 0
            seen.gone = 0
            return
        seen.note(table.pulse(place))
        if state == HERE and not table.lives(place):
            seen.gone += 1
        else:
            seen.gone = 0

    def _is_apart(self, other: int) -> bool:
        """Whether a rank of this node is known not to see the table; asked until it has come."""
        if other in self._apart:
            return True
        assert self._table is not None
        if self._table.state(self._local.index(other)) >= HERE:
            return False
        if self._store.check([APART.format(other)]):
            self._apart.add(other)
            return True
        return False

    def _unlink(self) -> None:
        """Take the table's name away when all have opened it."""
        if self._unlinked or self._table is None or not self._leads:
            return
        if all(self._table.state(place) >= HERE for place in range(len(self._local))):
            self._table.unlink()
            self._unlinked = True

    def _names(self, ranks: Sequence[int]) -> str:
        return " and ".join(self._name(rank) for rank in ranks)

    def _name(self, rank: int) -> str:
        if self._store.check([NAME.format(rank)]):
            return self._store.get(NAME.format(rank)).decode()
        return f"rank {rank}"  # it was gone before it could tell its roles
