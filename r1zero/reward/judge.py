"""Scores responses in worker processes that a hostile answer may hang or kill.

    submit --> waiting --> [worker: item being judged, next, next, ...] --> done --> collect

Nothing here blocks but `collect`. `submit` and `poll` move bytes both ways and return, so the engine calls
`poll` between decode steps and the workers judge while it decodes. A worker dies at the deadline of an item
(the item: TIMEOUT) or of anything else (CRASH); what stood behind the item waits again, and a new worker
starts. Which worker judges an item, and when, does not change its scores.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from r1zero.batch import Outcome, Score
from r1zero.reward.rules import AccuracyValues, select_rules
from r1zero.reward.worker import Setup, pack, unpack

ITEMS_AT_WORKER = 16  # enough work until the next poll, few enough that the workers end together
START_SECONDS = 300.0  # for a worker to import sympy from a slow shared disk
GRACE_SECONDS = 2.0  # after the deadline, for the kernel to end a worker by itself
STARTS = 3  # workers in a row that die before their first item until we give up

# The package is found from its own place, never from the current folder.
_ROOT = str(Path(__file__).resolve().parents[2])
_PROGRAM = (
    f"import sys; sys.path = [{_ROOT!r}, *filter(None, sys.path)]; "
    "from r1zero.reward.worker import main; main()"
)


@dataclass(frozen=True, slots=True)
class _Item:
    key: Hashable
    response: str
    answer: str


@dataclass(eq=False, slots=True)
class _Worker:
    """A process, the bytes on their way to and from it, and its items, the one being judged first."""

    process: subprocess.Popen[bytes]
    outgoing: bytearray
    incoming: bytearray = field(default_factory=bytearray)
    items: deque[_Item] = field(default_factory=deque)
    ready: bool = False
    since: float = field(default_factory=time.monotonic)  # of its last sign of life, or of new work

    def write(self) -> None:
        """Hand over as many bytes as the pipe takes."""
        try:
            while self.outgoing:
                del self.outgoing[: os.write(self.process.stdin.fileno(), self.outgoing)]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.outgoing.clear()  # it is dead, which reading will tell

    def read(self) -> bool:
        """Take what the pipe holds; return False when the process has ended."""
        try:
            while chunk := os.read(self.process.stdout.fileno(), 1 << 16):
                self.incoming += chunk
        except BlockingIOError:
            return True
        return False


class Judge:
    """A pool of worker processes with a queue. `weights` belong to `rules`; see `rules.RULES` for names.

    Use as a context manager, or call `close`. Raises ValueError for rules that cannot be, and RuntimeError
    from `poll`, `submit` or `collect` when workers cannot start or fail their self-test.
    """

    def __init__(
        self,
        rules: Sequence[str],
        weights: Sequence[float],
        workers: int = 2,
        deadline_seconds: float = 5.0,
        accuracy: AccuracyValues = AccuracyValues(),
        memory_bytes: int = 2 << 30,
    ) -> None:
        self.rules = select_rules(rules, accuracy)
        if len(weights) != len(self.rules):
            raise ValueError(
                f"reward.verifier_weight: {len(weights)} weights for {len(self.rules)} scorers in "
                "reward.verifier_function; give one for each"
            )
        if workers < 1 or deadline_seconds <= 0:
            raise ValueError(
                f"reward: {workers} workers with a deadline of {deadline_seconds} s cannot judge; "
                "at least 1 worker and more than 0 s are needed"
            )
        self.weights = dict(zip(self.rules, weights, strict=True))
        self.deadline_seconds = deadline_seconds
        self.replaced = 0  # workers that died and were replaced
        self._setup = Setup(list(rules), accuracy, deadline_seconds, memory_bytes).message()
        self._waiting: deque[_Item] = deque()
        self._pending: set[Hashable] = set()
        self._done: dict[Hashable, dict[str, Score]] = {}
        self._failed_starts = 0
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        for _ in range(workers):
            self._start()

    def submit(self, key: Hashable, response: str, answer: str) -> None:
        """Queue a response under a key that is not in use; return at once."""
        assert key not in self._pending and key not in self._done, f"{key} is being judged already"
        self._pending.add(key)
        self._waiting.append(_Item(key, response, answer))
        self.poll()

    def collect(self, keys: Iterable[Hashable]) -> dict[Hashable, dict[str, Score]]:
        """Wait until these submitted keys are judged; return and forget their scores by rule."""
        wanted = list(keys)
        for key in wanted:
            assert key in self._pending or key in self._done, f"{key} was never submitted"
        while any(key in self._pending for key in wanted):
            self.poll(wait_seconds=0.5)
        return {key: self._done.pop(key) for key in wanted}

    def reward(self, scores: Mapping[str, Score]) -> float:
        """Return the weighted sum of the scores of a response."""
        return sum(weight * scores[rule].value for rule, weight in self.weights.items())

    def poll(self, wait_seconds: float = 0.0) -> None:
        """Take finished scores, hand out work, replace dead workers; wait for news if asked to."""
        for event, _ in self._selector.select(wait_seconds):
            worker: _Worker = event.data
            if worker not in self._workers:
                continue  # buried a moment ago
            if event.fileobj is worker.process.stdin:
                self._push(worker)
            else:
                alive = worker.read()
                self._take(worker)
                if not alive:
                    self._bury(worker)
        self._kill_stuck()
        self._hand_out()

    def close(self) -> None:
        """End all workers; unfinished items are lost."""
        for worker in self._workers:
            self._end(worker)
        self._workers.clear()
        self._selector.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        # Popen, since a fork of a process with torch's threads may hang; the environment is inherited.
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        worker = _Worker(process, bytearray(self._setup))
        for pipe in (process.stdin, process.stdout):
            os.set_blocking(pipe.fileno(), False)
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        self._workers.append(worker)
        self._push(worker)

    def _take(self, worker: _Worker) -> None:
        """Read the messages that a worker has sent so far."""
        while (message := unpack(worker.incoming)) is not None:
            worker.since = time.monotonic()
            if not worker.ready:
                if message["broken"]:
                    raise RuntimeError(f"The answer checker fails its self-test: {message['broken']}.")
                worker.ready, self._failed_starts = True, 0
                continue
            scores = (Score(value, Outcome(outcome)) for value, outcome in message["scores"])
            self._finish(worker.items.popleft(), dict(zip(self.rules, scores, strict=True)))

    def _finish(self, item: _Item, scores: dict[str, Score]) -> None:
        self._pending.remove(item.key)
        self._done[item.key] = scores

    def _bury(self, worker: _Worker) -> None:
        """Replace a dead worker: the item in its hands failed, the others wait again, first in line."""
        self._end(worker)
        self._workers.remove(worker)
        status = worker.process.returncode
        if worker.ready:
            self.replaced += 1
            if worker.items:
                outcome = Outcome.TIMEOUT if status == -signal.SIGALRM else Outcome.CRASH
                self._fail(worker.items.popleft(), outcome)
                self._waiting.extendleft(reversed(worker.items))
        else:
            self._failed_starts += 1
            if self._failed_starts == STARTS:
                raise RuntimeError(
                    f"{STARTS} reward workers in a row ended before their first item, the last with status "
                    f"{status}; run `{sys.executable} -c 'import r1zero.reward.math_answer'` to see why."
                )
        self._start()

    def _fail(self, item: _Item, outcome: Outcome) -> None:
        self._finish(item, {name: rule.failure(outcome) for name, rule in self.rules.items()})

    def _kill_stuck(self) -> None:
        """Kill workers that neither answer nor die, such as stopped ones."""
        now = time.monotonic()
        for worker in list(self._workers):
            limit = self.deadline_seconds + GRACE_SECONDS if worker.ready else START_SECONDS
            if (worker.items or not worker.ready) and now - worker.since > limit:
                worker.process.kill()
                if worker.items:
                    self._fail(worker.items.popleft(), Outcome.TIMEOUT)
                    self._waiting.extendleft(reversed(worker.items))
                    worker.items.clear()
                self._bury(worker)

    def _hand_out(self) -> None:
        """Give waiting items to the workers with the least to do, and push bytes."""
        ready = [worker for worker in self._workers if worker.ready]
        while self._waiting and ready:
            worker = min(ready, key=lambda each: len(each.items))
            if len(worker.items) >= ITEMS_AT_WORKER:
                break
            item = self._waiting.popleft()
            if not worker.items:
                worker.since = time.monotonic()
            worker.items.append(item)
            worker.outgoing += pack({"response": item.response, "answer": item.answer})
        for worker in ready:
            self._push(worker)

    def _push(self, worker: _Worker) -> None:
        """Write what the pipe takes; listen for room only while something is left."""
        pipe = worker.process.stdin
        worker.write()
        listening = pipe in self._selector.get_map()
        if worker.outgoing and not listening:
            self._selector.register(pipe, selectors.EVENT_WRITE, worker)
        elif listening and not worker.outgoing:
            self._selector.unregister(pipe)

    def _end(self, worker: _Worker) -> None:
        for pipe in (worker.process.stdin, worker.process.stdout):
            if pipe in self._selector.get_map():
                self._selector.unregister(pipe)
        worker.process.kill()
        worker.process.wait()
        worker.process.stdin.close()
        worker.process.stdout.close()
