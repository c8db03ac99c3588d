"""Who is missed, and by what: thousands of lookouts over a store that serves so many calls a second."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Collection
from pathlib import Path

import pytest

from r1zero.distributed.lookout import (
    GONE_POLLS,
    KEY,
    NAME,
    NEWS,
    SILENT_POLLS,
    SUSPECT_POLLS,
    Lookout,
)
from r1zero.distributed.node_table import COMING, FAILED, HERE, LEFT, RUNNING, STORE_LOST, NodeTable


class Store:
    """A store in memory that counts calls, and can be gone."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.calls = 0
        self.is_gone = False

    def _call(self) -> None:
        self.calls += 1
        if self.is_gone:
            raise RuntimeError("connection reset")

    def set(self, key: str, value: str) -> None:
        self._call()
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        self._call()
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        self._call()
        return all(key in self.values for key in keys)

    def wait(self, keys: list[str], timeout: object) -> None:
        if not self.check(keys):
            raise RuntimeError("wait timeout")

    def add(self, key: str, amount: int) -> int:
        self._call()
        value = int(self.values.get(key, b"0")) + amount
        self.values[key] = str(value).encode()
        return value


class Node:
    """What a node's ranks share in memory; the file of a real one."""

    def __init__(self, places: int) -> None:
        self.pulses = [0] * places
        self.states = [COMING] * places
        self.alive = [True] * places
        self.known = RUNNING


class Tables:
    """Tables of nodes, as NodeTable opens them, but for these places."""

    def __init__(self, hidden_from: Collection[int]) -> None:
        self.nodes: dict[str, Node] = {}
        self._hidden_from = hidden_from

    def make(self, places: int) -> Table:
        path = f"table {len(self.nodes)}"
        self.nodes[path] = Node(places)
        return Table(self.nodes[path], 0, path)

    def __call__(self, path: Path, place: int) -> Table:
        if place in self._hidden_from:
            raise FileNotFoundError(path)
        return Table(self.nodes[str(path)], place, str(path))


class Table:
    """One rank's view of a node."""

    def __init__(self, node: Node, place: int, path: str) -> None:
        self.node = node
        self.path = Path(path)
        self._place = place
        node.states[place] = HERE

    def beat(self) -> None:
        self.node.pulses[self._place] += 1

    def leave(self) -> None:
        self.node.states[self._place] = LEFT

    def unlink(self) -> None:
        pass

    def pulse(self, place: int) -> int:
        return self.node.pulses[place]

    def state(self, place: int) -> int:
        return self.node.states[place]

    def lives(self, place: int) -> bool:
        return self.node.alive[place]

    @property
    def known(self) -> int:
        return self.node.known

    def tell(self, known: int) -> None:
        self.node.known = max(known, self.node.known)


class World:
    """Lookouts of `nodes` x `local` ranks, and seconds that pass for all of them.

    `absent` ranks ended before they looked; tables are `hidden_from` these places on every node.
    """

    def __init__(
        self,
        nodes: int,
        local: int,
        calls_a_second: int = 10**9,
        absent: Collection[int] = (),
        hidden_from: Collection[int] = (),
    ) -> None:
        self.local = local
        self.store = Store()
        self.tables = Tables(hidden_from)
        self.calls_a_second = calls_a_second
        node_of_rank = [node for node in range(nodes) for _ in range(local)]
        self.lookouts: dict[int, Lookout] = {}
        for rank in range(nodes * local):
            if rank in absent:
                continue
            self.store.set(NAME.format(rank), f"rank {rank}")
            self.lookouts[rank] = Lookout(self.store, rank, node_of_rank, self.tables)
        self.waiting = list(self.lookouts)  # for the store, the longest first
        self.causes: list[str] = []

    def second(self) -> int:
        """Let a second pass; returns the calls that the store served in it.

        A rank's look ends when the store has served it, and it looks once a second at most.
        """
        before = self.store.calls
        looked = []
        for rank in self.waiting:
            if self.store.calls - before >= self.calls_a_second:
                break
            looked.append(rank)
            cause = self.lookouts[rank].look()
            if cause is not None:
                self.causes.append(cause)
        self.waiting = self.waiting[len(looked) :] + looked
        return self.store.calls - before

    def kill(self, *ranks: int) -> None:
        for rank in ranks:
            node = list(self.tables.nodes.values())[rank // self.local]
            node.alive[rank % self.local] = False
            self.stop(rank)

    def stop(self, rank: int) -> None:
        """It lives, and does nothing any more."""
        self.waiting.remove(rank)

    def seconds_until_a_cause(self, at_most: int) -> int:
        for second in range(1, at_most + 1):
            self.second()
            if self.causes:
                return second
        raise AssertionError(f"nobody is missed in {at_most} s")


def test_nobody_innocent_is_named_when_all_of_2048_ranks_lose_a_connection() -> None:
    """The store serves little more than the calm needs, 3 calls a second of each of 128 nodes."""
    world = World(128, 16, calls_a_second=450)
    for _ in range(5):
        world.second()
    world.waiting.sort(key=lambda rank: rank % 16)  # as unfair as can be
    assert max(world.second() for _ in range(3)) <= 450
    world.kill(1234)
    for rank in world.waiting:
        world.lookouts[rank].suspect()
    for _ in range(2 * SILENT_POLLS):
        world.second()
    assert set(world.causes) == {"rank 1234 ended without a word (killed, or out of memory?)"}


@pytest.mark.parametrize(("nodes", "local"), [(32, 16), (100, 1)])
def test_the_calm_costs_three_calls_a_node(nodes: int, local: int) -> None:
    world = World(nodes, local)
    for _ in range(3):
        world.second()
    assert world.second() == 3 * nodes


@pytest.mark.parametrize("rank", [0, 5, 16, 31])
def test_a_process_that_ends_is_missed_within_three_looks(rank: int) -> None:
    """By the first rank of its node; that one by all others there."""
    world = World(2, 16)
    for _ in range(3):
        world.second()
    world.kill(rank)
    assert world.seconds_until_a_cause(30) == GONE_POLLS
    assert set(world.causes) == {f"rank {rank} ended without a word (killed, or out of memory?)"}


@pytest.mark.parametrize(("suspects", "polls"), [(False, SILENT_POLLS), (True, SUSPECT_POLLS)])
def test_a_node_that_is_gone_is_missed_by_the_one_before(suspects: bool, polls: int) -> None:
    world = World(3, 4)
    for _ in range(3):
        world.second()
    world.kill(4, 5, 6, 7)
    if suspects:
        world.lookouts[10].suspect()  # not the one that will look
    assert polls <= world.seconds_until_a_cause(60) <= polls + 2
    [cause] = world.causes
    assert cause.startswith("rank 4 shows no sign of life for ")


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_does_nothing_any_more_is_missed_after_thirty(rank: int) -> None:
    world = World(2, 4)
    for _ in range(3):
        world.second()
    world.stop(rank)
    assert SILENT_POLLS <= world.seconds_until_a_cause(60) <= SILENT_POLLS + 1
    assert all(cause.startswith(f"rank {rank} shows no sign of life") for cause in world.causes)


@pytest.mark.parametrize("places", [[3], [1, 2, 3]])
def test_ranks_in_containers_of_their_own_are_seen_through_the_store(places: list[int]) -> None:
    world = World(2, 4, hidden_from=places)
    for _ in range(40):
        world.second()
    assert not world.causes
    world.stop(3)
    assert SILENT_POLLS <= world.seconds_until_a_cause(60) <= SILENT_POLLS + 1
    assert world.causes == ["rank 3 shows no sign of life for 30 s (killed, or its node is gone?)"]


def test_who_leaves_in_peace_is_not_missed() -> None:
    world = World(2, 4)
    for _ in range(3):
        world.second()
    for rank in (1, 4):
        world.lookouts[rank].leave()
        world.kill(rank)
    for _ in range(SILENT_POLLS - 3):
        world.second()
    assert not world.causes


@pytest.mark.parametrize(("suspects", "polls"), [(False, SILENT_POLLS), (True, SUSPECT_POLLS)])
def test_a_rank_that_died_before_it_opened_the_table_is_missed_by_its_number(
    suspects: bool, polls: int
) -> None:
    world = World(1, 4, absent=[2])
    if suspects:
        world.lookouts[3].suspect()
    assert polls <= world.seconds_until_a_cause(60) <= polls + 2
    assert world.causes[0].startswith("rank 2 shows no sign of life")


def test_all_ranks_of_a_node_hear_of_a_cause_and_of_a_lost_store() -> None:
    world = World(2, 4)
    for _ in range(3):
        world.second()
    world.store.set(KEY, "the moon is in the way")
    world.store.add(NEWS, 1)
    for _ in range(2):
        world.second()
    assert {lookout.known for lookout in world.lookouts.values()} == {FAILED}
    world = World(2, 4)
    for _ in range(3):
        world.second()
    world.store.is_gone = True
    for _, rank in itertools.product(range(5), range(8)):
        if rank % 4 == 0:
            with pytest.raises(RuntimeError):
                world.lookouts[rank].look()
        else:
            assert world.lookouts[rank].look() is None, "it does not ask the store"
    assert {lookout.known for lookout in world.lookouts.values()} == {STORE_LOST}


def test_a_tables_file_tells_who_lives() -> None:
    """Of real processes: the lock of a rank goes with it, whatever it has forked."""
    table = NodeTable.make(3)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        mine = NodeTable(table.path, 2)
        mine.beat()
        if os.fork() == 0:  # what it has forked lives on
            time.sleep(30)
            os._exit(0)
        os.write(writer, b"x")
        time.sleep(30)
        os._exit(0)
    os.read(reader, 1)
    assert (table.state(1), table.state(2)) == (COMING, HERE)
    assert table.pulse(2) == 1 and table.lives(2)
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # not yet reaped
    assert not table.lives(2)
    os.waitpid(child, 0)
    table.unlink()
    assert not table.path.exists() and table.known == RUNNING
