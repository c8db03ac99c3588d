"""Rendezvous: the ranks of a job meet with a time limit and name those that do not answer.

Everything goes through the job's key-value store, since a collective cannot say whom it waits for.
A rank writes down that it has entered a stage, and that it is through; when the time is over, what
is missing tells the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch.distributed as dist

from r1zero.distributed.launch import Launch
from r1zero.errors import BadInput

PREFIX = "r1zero/rollcall/"
START = "r1zero/start/"
POLL_SECONDS = 0.1
RESOLVE_SECONDS = 60.0  # that a name may take to get an address
# that rank 0, which may hold the store, stays for others to read who is missing
VERDICT_SECONDS = 1.0


def open_store(launch: Launch, seconds: float) -> dist.Store:
    """Reach the job's store; rank 0 opens it unless torchrun has. BadInput when it cannot be
    reached in time."""
    if launch.launcher == "single":
        return dist.HashStore()
    _resolve(launch, min(seconds, RESOLVE_SECONDS))
    opens = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return dist.TCPStore(
            launch.address,
            launch.port,
            None,
            opens,
            timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        if opens:
            what = "cannot open the meeting point"
        else:
            what = "cannot reach rank 0"
        reason = str(error).split(". This is typically")[0].splitlines()[0]
        raise BadInput(
            f"rank {launch.rank} {what} at {launch.address}:{launch.port} within {seconds:g} s "
            f"({reason}); set MASTER_ADDR to an address of the first node that all nodes reach "
            "and MASTER_PORT to a free port that no firewall closes, and see that rank 0 has "
            "started"
        ) from None


def _resolve(launch: Launch, seconds: float) -> None:
    """Wait until the name of rank 0's machine has an address, as that of a new pod has a moment
    late."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(launch.address, launch.port)
            return
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise BadInput(
                    f"MASTER_ADDR={launch.address} has no address that rank {launch.rank} can "
                    f"find within {seconds:g} s ({error.strerror}); set it to a name or address "
                    "of the first node that all nodes reach"
                ) from None
        time.sleep(POLL_SECONDS)


def join(launch: Launch, seconds: float) -> dist.Store:
    """Meet the other ranks; returns the store of this start of theirs. BadInput when that fails.

    All that is wrong with the network between the ranks shows here or when the first group is made.
    """
    return own_part(open_store(launch, seconds), launch, seconds)


def own_part(store: dist.Store, launch: Launch, seconds: float) -> dist.Store:
    """The part of the job's store that this start of the ranks has for itself. BadInput when one
    does not come.

    torchrun's store outlives a restart: the addresses and failures in it are those of the ranks
    before. Its count of restarts would not tell them apart, since it differs between nodes when
    only some of them saw a failure. So rank 0 thinks of a name, and tells it to whoever asks; ranks
    ask under names of their own, which none had before. That is five calls a rank, of which two
    wait in the store; rank 0 tells each in one, and reads all of them in one.
    """
    mine = uuid.uuid4().hex
    if launch.rank == 0:
        _tell(store, mine, launch.world_size, time.monotonic() + seconds, seconds)
        return dist.PrefixStore(START + mine, store)
    try:
        store.set(f"{START}asks/{launch.rank}", mine)
        name = store.get(f"{START}tells/{mine}").decode()
        store.set(f"{START}{name}/here/{launch.rank}", "")
        store.add(f"{START}{name}/count", 1)
        store.get(f"{START}{name}/complete")
    except RuntimeError:
        raise BadInput(
            f"rank {launch.rank} waited for rank 0 in vain; see that all ranks start"
        ) from None
    return dist.PrefixStore(START + name, store)


def _tell(store: dist.Store, name: str, size: int, deadline: float, seconds: float) -> None:
    """Tell the name to all other ranks, until each has come under it."""
    asks = [f"{START}asks/{rank}" for rank in range(1, size)]
    told: set[bytes] = set()
    all_asked = _all_there(store, asks, deadline)
    # Some may still be what a rank before the restart has asked.
    while all_asked and store.add(f"{START}{name}/count", 0) < size - 1:
        for ask in set(store.multi_get(asks)) - told:
            store.set(f"{START}tells/{ask.decode()}", name)
            told.add(ask)
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    coming = [rank for rank in range(1, size) if not store.check([f"{START}{name}/here/{rank}"])]
    if coming:
        raise BadInput(
            f"rank {', '.join(map(str, coming[:8]))} did not come within {seconds:g} s; see "
            "that all ranks start"
        )
    store.set(f"{START}{name}/complete", "")


def _all_there(store: dist.Store, keys: list[str], deadline: float) -> bool:
    """Wait for keys in one call, until a moment; whether they came."""
    left = max(0.01, deadline - time.monotonic())
    try:
        store.wait(keys, timedelta(seconds=left))
    except dist.DistStoreError:
        return False
    return True


class RollCall:
    """One rank's part in the meeting."""

    def __init__(
        self, store: dist.Store, launch: Launch, seconds: float, silence: Callable[[str], None]
    ) -> None:
        """`silence(sentence)` is called, from a thread of its own, on the first rank that waits in
        a stage."""
        self._store = store
        self._launch = launch
        self.seconds = seconds
        self._silence = silence

    def call(self) -> list[int]:
        """Wait until all ranks have come or the time is over; returns the missing ones, on every
        rank that came."""
        self._set(f"here/{self._launch.rank}")
        deadline = time.monotonic() + self.seconds
        if self._launch.rank == 0:
            missing = []
            if not _all_there(self._store, self._keys("here"), deadline):
                missing = self._without("here", range(self._launch.world_size))
            self._set("missing", json.dumps(missing))
            time.sleep(VERDICT_SECONDS if missing else 0.0)
            return missing
        verdict = f"{PREFIX}missing"
        # rank 0 may have begun to wait later
        if not _all_there(self._store, [verdict], deadline + self.seconds):
            return [0]
        return json.loads(self._store.get(verdict))

    def gather(self, name: str, text: str) -> list[str]:
        """Collect a text from every rank, in rank order, on every rank. All have answered
        `call`.

        Rank 0 reads them all and writes them down as one, so that the others read once.
        """
        self._set(f"{name}/{self._launch.rank}", text)
        joined = f"{PREFIX}{name}/all"
        limit = timedelta(seconds=2 * self.seconds)
        with self.stage(f"{name}/read", range(self._launch.world_size)):
            if self._launch.rank == 0:
                keys = self._keys(name)
                self._store.wait(keys, limit)
                texts = [found.decode() for found in self._store.multi_get(keys)]
                self._store.set(joined, json.dumps(texts))
                return texts
            self._store.wait([joined], limit)
            return json.loads(self._store.get(joined))

    @contextlib.contextmanager
    def stage(self, name: str, ranks: Sequence[int]) -> Iterator[None]:
        """Do what these ranks do together; if it lasts too long, `silence` hears who did not come
        or is stuck."""
        self._set(f"{name}/in/{self._launch.rank}")
        timer = threading.Timer(self.seconds, self._late, (name, ranks))
        timer.daemon = True
        timer.start()
        try:
            yield
            self._set(f"{name}/through/{self._launch.rank}")
        finally:
            timer.cancel()

    def named(self, ranks: Sequence[int]) -> str:
        """As in `rank 3 (node 1), rank 5 (node 2)`."""
        return ", ".join(f"rank {rank} (node {self._launch.node_of_rank[rank]})" for rank in ranks)

    def _late(self, name: str, ranks: Sequence[int]) -> None:
        missing = self._without(f"{name}/in", ranks)
        stuck = self._without(f"{name}/through", [rank for rank in ranks if rank not in missing])
        if self._launch.rank != min(stuck):
            return
        if missing:
            self._silence(
                f"{name}: no answer within {self.seconds:g} s from {self.named(missing)}; look at "
                "what these processes print, and at the memory of their nodes"
            )
        else:
            self._silence(
                f"{name}: all came, but {self.named(stuck)} did not get through within "
                f"{self.seconds:g} s; the network between these nodes carries the "
                "meeting, but not this group: set GLOO_SOCKET_IFNAME "
                "(HCCL_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) to the interface that joins "
                "them"
            )

    def _set(self, key: str, text: str = "1") -> None:
        self._store.set(PREFIX + key, text)

    def _keys(self, name: str) -> list[str]:
        """What each rank writes under this name."""
        return [f"{PREFIX}{name}/{rank}" for rank in range(self._launch.world_size)]

    def _without(self, name: str, ranks: Sequence[int]) -> list[int]:
        return [rank for rank in ranks if not self._store.check([f"{PREFIX}{name}/{rank}"])]
