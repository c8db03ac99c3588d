"""A process of the judge: reads items from stdin, scores them one by one, writes the scores to stdout.

It holds sympy and nothing heavy. Its life is cheap: the kernel ends it at the deadline of an item, whatever
the item makes it do, and its memory is bounded; the judge starts another.

Messages both ways are JSON behind four bytes of length. The first one in holds the Setup, the first one out
{"broken": sentence or ""}; after that each {"response", "answer"} is answered, in order, by {"scores"}.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from r1zero.batch import Outcome, Score
from r1zero.reward.rules import AccuracyValues, Rule, accuracy, select_rules

_LENGTH = struct.Struct(">I")

# (right answer, response, whether it is right): one for each way through the comparison.
SELF_TEST = [
    ("34", r"\boxed{34}", True),
    ("34", r"\boxed{35}", False),
    (r"\frac{1}{2}", r"\boxed{0.5}", True),
    ("0.5", r"\boxed{50}", False),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", True),
    ("(x+1)^2", r"\boxed{x^2+2x+1}", True),
    ("(x+1)^2", r"\boxed{x^2+2x+2}", False),
    (r"[1,\infty)", r"\boxed{(1,\infty)}", False),
]


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know: scorers by name, values of `acc`, limits of time and of memory."""

    rules: list[str]
    accuracy: AccuracyValues
    deadline_seconds: float
    memory_bytes: int

    def message(self) -> bytes:
        return pack(asdict(self))


def pack(message: dict[str, Any]) -> bytes:
    """Return a message as bytes for the pipe."""
    body = json.dumps(message).encode("ascii")  # escapes what is no character, such as half a surrogate pair
    return _LENGTH.pack(len(body)) + body


def unpack(buffer: bytearray) -> dict[str, Any] | None:
    """Take the first message out of a buffer; None while it is not all there."""
    if len(buffer) < _LENGTH.size:
        return None
    end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
    if len(buffer) < end:
        return None
    body = bytes(buffer[_LENGTH.size : end])
    del buffer[:end]
    return json.loads(body)


def _receive(pipe: BinaryIO) -> dict[str, Any] | None:
    """Wait for a message; None when the judge is gone."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    size = _LENGTH.unpack(head)[0]
    body = pipe.read(size)
    return json.loads(body) if len(body) == size else None


def _send(pipe: BinaryIO, message: dict[str, Any]) -> None:
    pipe.write(pack(message))
    pipe.flush()


def self_test() -> str:
    """Compare known answers; return "" or a sentence about the first wrong verdict."""
    for gold, response, right in SELF_TEST:
        if accuracy(response, gold) != float(right):
            return f"{response} is{'' if right else ' not'} {gold}, but the comparison says otherwise"
    return ""


def _bound_memory(extra_bytes: int) -> None:
    """Let this process grow by `extra_bytes` of address space from where it is."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _score(rule: Rule, response: str, answer: str) -> Score:
    try:
        return rule(response, answer)
    except (MemoryError, RecursionError):
        return rule.failure(Outcome.CRASH)


def main() -> None:
    """Serve the judge until stdin ends."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)  # what a library prints must not end up between messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the judge, whose end is ours
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel kills; Python may be deep in C
    setup = _receive(inbox)
    if setup is None:
        return
    rules = select_rules(setup["rules"], AccuracyValues(**setup["accuracy"]))
    broken = self_test()
    _bound_memory(setup["memory_bytes"])
    _send(outbox, {"broken": broken})
    while (item := _receive(inbox)) is not None:
        signal.setitimer(signal.ITIMER_REAL, setup["deadline_seconds"])
        scores = [_score(rule, item["response"], item["answer"]) for rule in rules.values()]
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(outbox, {"scores": [(score.value, score.outcome) for score in scores]})


if __name__ == "__main__":
    main()
