"""The process pool of the reward functions: a hostile answer may hang or kill a worker.

    put --> waiting --> [worker: item in hand, next, next, ...] --> poll

Nothing here blocks unless asked to. A worker runs the reward functions of an item one after the
other and tells each result. It dies at the deadline of a call (TIMEOUT) or of anything else
(CRASH): only the function in hand fails then; the rest of the item and what stood behind it wait again, first in line,
and a new worker starts. Workers are forked from a process that has sympy loaded (reward/fork_server.py).
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import selectors
import signal
import sys
import time
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from r1zero.reward.config import RewardConfig
from r1zero.reward.fork_client import ForkClient
from r1zero.reward.types import RewardInput
from r1zero.reward.worker import OUT_OF_MEMORY, Order, framed, setup_message, unframe
from r1zero.scores import Outcome, Score

ITEMS_AT_WORKER = 16  # enough work until the next poll, few enough that the workers end together
START_SECONDS = 300.0  # for a worker to import sympy from a slow shared disk
GRACE_SECONDS = 0.5  # after the deadline, for the kernel to end a worker by itself
STARTS = 3  # workers in a row that die before they are ready until we give up

log = logging.getLogger("r1zero")


@dataclass(eq=False, slots=True)
class WorkItem:
    """Responses of a group with the reward functions that are still to run on them, the first one
    in hand."""

    group: Hashable
    members: Sequence[int]
    cases: list[RewardInput]
    left: deque[str]
    scores: dict[str, list[Score]] = field(default_factory=dict)

    def note(self, scores: list[Score]) -> None:
        """Take the scores of the function in hand."""
        self.scores[self.left.popleft()] = scores


@dataclass(eq=False, slots=True)
class _Worker:
    """A process, the bytes on their way to and from it, and its items, the one in hand first."""

    number: int  # as the fork server knows it
    inlet: int  # where it reads
    outlet: int  # where it writes
    outgoing: bytearray
    pid: int | None = None  # None until it is forked
    incoming: bytearray = field(default_factory=bytearray)
    items: deque[WorkItem] = field(default_factory=deque)
    ready: bool = False
    since: float = field(default_factory=time.monotonic)  # of its last sign of life, or of new work

    def write(self) -> None:
        """Hand over as many bytes as the pipe takes."""
        try:
            while self.outgoing:
                del self.outgoing[: os.write(self.inlet, self.outgoing)]
                self.since = time.monotonic()
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.outgoing.clear()  # it is dead, which reading will tell

    def read(self) -> bool:
        """Take what the pipe holds; return False when nobody can write to it any more."""
        try:
            while chunk := os.read(self.outlet, 1 << 16):
                self.incoming += chunk
        except BlockingIOError:
            return True
        return False


class Pool:
    """A fixed number of workers. RuntimeError from `put` and `poll` when they cannot start or are
    broken."""

    def __init__(
        self,
        config: RewardConfig,
        failed: Mapping[str, float],
        start_seconds: float = START_SECONDS,
    ) -> None:
        """`failed` is what a response is worth on which a reward function fails, by shown name."""
        self.replaced = 0  # workers that died and were replaced
        self.slowest_seconds = 0.0  # longest call so far, as seen from here
        self.deadline_seconds = config.deadline_seconds
        self._failed = failed
        self._start_seconds = start_seconds
        self._setup = setup_message(config.of_worker)
        self._names = config.functions
        self._waiting: deque[WorkItem] = deque()
        self._finished: list[WorkItem] = []
        self._failed_starts = 0
        self._selector = selectors.DefaultSelector()
        self._numbers = count()
        self._workers: dict[int, _Worker] = {}  # by number
        self._server = self._start_server()
        for _ in range(config.workers):
            self._start()

    @property
    def processes(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.pid for worker in self._workers.values() if worker.pid is not None]

    @property
    def ready(self) -> bool:
        """Whether all workers have started."""
        return all(worker.ready for worker in self._workers.values())

    def put(self, item: WorkItem) -> None:
        """Queue an item."""
        self._waiting.append(item)

    def poll(self, wait_seconds: float = 0.0) -> list[WorkItem]:
        """Hand out work, replace dead workers, return finished items; wait for news if asked to."""
        self._hand_out()
        self._server.flush()
        for event, _ in self._selector.select(wait_seconds):
            if event.fileobj is self._server:
                self._hear()
            elif event.data in self._workers:  # not buried a moment ago
                self._exchange(self._workers[event.data], event.fd)
        self._kill_stuck()
        self._hand_out()
        finished = self._finished
        self._finished = []
        return finished

    def close(self) -> None:
        """End all workers; unfinished items are lost."""
        for worker in self._workers.values():
            self._end(worker)
        self._workers.clear()
        self._server.close()
        self._selector.close()

    def _start_server(self) -> ForkClient:
        server = ForkClient(self._names)
        self._selector.register(server, selectors.EVENT_READ)
        return server

    def _start(self) -> None:
        number = next(self._numbers)
        inlet, outlet = self._server.fork(number)
        worker = _Worker(number, inlet, outlet, bytearray(self._setup))
        self._selector.register(outlet, selectors.EVENT_READ, number)
        self._workers[number] = worker
        self._push(worker)

    def _exchange(self, worker: _Worker, pipe: int) -> None:
        """Write to a worker or read from it, whichever its pipe is ready for."""
        if pipe == worker.inlet:
            self._push(worker)
            return
        if not worker.read():
            self._selector.unregister(worker.outlet)  # the fork server tells how it ended
        self._take(worker)

    def _hear(self) -> None:
        """Take the news of the fork server."""
        try:
            while (news := self._server.news()) is not None:
                worker = self._workers.get(news["worker"])
                if worker is None:
                    continue  # killed and buried before
                if "pid" in news:
                    worker.pid = news["pid"]
                else:
                    self._replace(worker, news["status"])
        except EOFError:
            self._replace_server()

    def _replace_server(self) -> None:
        """Start another fork server in place of one that has ended, and all workers with it."""
        self._selector.unregister(self._server)
        status = self._server.close()
        self._server = self._start_server()
        for worker in list(self._workers.values()):
            self._replace(worker, status)

    def _replace(self, worker: _Worker, status: int) -> None:
        """Take the last words of a worker that ended with this status, and start another."""
        worker.read()
        self._take(worker)
        self._bury(worker, *_cause(status, self.deadline_seconds))

    def _take(self, worker: _Worker) -> None:
        """Read the messages that a worker has sent so far."""
        while (body := unframe(worker.incoming)) is not None:
            message = json.loads(body)
            if not worker.ready:
                if message["broken"]:
                    raise RuntimeError(message["broken"])
                worker.ready = True
                self._failed_starts = 0
            elif "crash" in message:
                self._fail(worker, Outcome.CRASH, message["crash"])
            else:
                self._note(
                    worker, [Score(value, Outcome(outcome)) for value, outcome in message["scores"]]
                )
            for line in message.get("told", ()):
                log.warning("reward worker: %s", line)
            worker.since = time.monotonic()

    def _note(self, worker: _Worker, scores: list[Score]) -> None:
        """Give the item in hand the scores of the function in hand."""
        self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - worker.since)
        worker.items[0].note(scores)
        if not worker.items[0].left:
            self._finished.append(worker.items.popleft())

    def _fail(self, worker: _Worker, outcome: Outcome, why: str) -> None:
        item = worker.items[0]
        value = self._failed[item.left[0]]
        self._note(worker, [Score(value, outcome, why)] * len(item.cases))

    def _bury(self, worker: _Worker, outcome: Outcome, why: str) -> None:
        """Replace a worker that died: the function in its hands failed, all the rest waits again."""
        self._end(worker)
        del self._workers[worker.number]
        if worker.ready:
            self.replaced += 1
            if worker.items:
                self._fail(worker, outcome, why)
                self._waiting.extendleft(reversed(worker.items))
        else:
            self._failed_starts += 1
            if self._failed_starts == STARTS:
                raise RuntimeError(
                    f"{STARTS} reward workers in a row ended before they were ready ({why}); run "
                    f"`{sys.executable} -c 'import r1zero.reward.math.grade'`, or import your "
                    "reward functions, to see why"
                )
        self._start()

    def _kill_stuck(self) -> None:
        """Kill workers that neither answer nor die, such as stopped ones."""
        now = time.monotonic()
        deadline = self.deadline_seconds
        for worker in list(self._workers.values()):
            if not worker.ready and now - worker.since > self._start_seconds:
                raise RuntimeError(
                    f"a reward worker is not ready after {self._start_seconds:.0f} s: a reward "
                    f"function hangs when it is imported, or the disk of {sys.prefix} is very slow"
                )
            if worker.items and now - worker.since > deadline + GRACE_SECONDS:
                self._bury(worker, *_cause(-signal.SIGALRM, deadline))

    def _hand_out(self) -> None:
        """Give waiting items to the workers with the least to do, and push bytes."""
        ready = [worker for worker in self._workers.values() if worker.ready]
        while self._waiting and ready:
            worker = min(ready, key=lambda each: len(each.items))
            if len(worker.items) >= ITEMS_AT_WORKER:
                break
            item = self._waiting.popleft()
            if not worker.items:
                worker.since = time.monotonic()
            worker.items.append(item)
            worker.outgoing += framed(pickle.dumps(Order(list(item.left), item.cases)))
        for worker in ready:
            self._push(worker)

    def _push(self, worker: _Worker) -> None:
        """Write what the pipe takes; listen for room only while something is left."""
        pipe = worker.inlet
        worker.write()
        listening = pipe in self._selector.get_map()
        if worker.outgoing and not listening:
            self._selector.register(pipe, selectors.EVENT_WRITE, worker.number)
        elif listening and not worker.outgoing:
            self._selector.unregister(pipe)

    def _end(self, worker: _Worker) -> None:
        """Kill a worker, if it still lives, and forget its pipes."""
        self._server.kill(worker.number)
        for pipe in (worker.inlet, worker.outlet):
            if pipe in self._selector.get_map():
                self._selector.unregister(pipe)
            os.close(pipe)


def _cause(status: int, deadline_seconds: float) -> tuple[Outcome, str]:
    """Say what ended a worker with this status."""
    if status == -signal.SIGALRM:
        return Outcome.TIMEOUT, f"no score within {deadline_seconds:g} s"
    if status == OUT_OF_MEMORY:
        return Outcome.CRASH, "out of the memory that reward.worker_memory_megabytes allows"
    return Outcome.CRASH, f"its process ended with status {status}"
