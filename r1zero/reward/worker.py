"""A worker process of the reward executor: orders come by one pipe, scores go by another.

It holds sympy and the user's own reward functions. Its life is cheap: the kernel ends it at the deadline of a call,
whatever the response makes it do, and its memory is bounded; the reward executor starts another.

Messages both ways stand behind four bytes of length. In: a pickled Setup, then pickled Orders. Out
is JSON, since nothing that happens here may run code there: {"broken": sentences or "", "declared":
what each function declares} once, then for each reward function of each order
{"scores": [[value, outcome], ...]} or {"crash": why}, both with "told": [lines of its log].
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import resource
import signal
import struct
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from r1zero.errors import BadInput
from r1zero.reward.loaded import LoadedFunction, load_functions
from r1zero.reward.types import FunctionSettings, RewardInput
from r1zero.reward.verdict import verdict
from r1zero.scores import Outcome

# The package is found from its own place. The current folder comes last: nothing in it hides a
# library.
_ROOT = str(Path(__file__).resolve().parents[2])
PATH_OF_PROGRAMS = f"import os, sys; sys.path = [{_ROOT!r}, *filter(None, sys.path), os.getcwd()]"
PROGRAM = f"{PATH_OF_PROGRAMS}; from r1zero.reward.worker import main; main()"
_LENGTH = struct.Struct(">I")
OUT_OF_MEMORY = 113  # exit status that nothing else is likely to use
WHY_CHARACTERS = 300
# of the log of one call
MOST_LINES = 20
LINE_CHARACTERS = 600

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


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker needs to know before its first order."""

    names: Sequence[str]  # of reward functions, as configured
    settings: FunctionSettings
    deadline_seconds: float  # of one call
    memory_megabytes: int  # that it may grow by


@dataclass(frozen=True, slots=True)
class Order:
    """Reward functions by shown name, to be run in this order on these responses."""

    names: list[str]
    cases: list[RewardInput]


def framed(body: bytes) -> bytes:
    """Return a message as bytes for the pipe."""
    return _LENGTH.pack(len(body)) + body


def setup_message(setup: Setup) -> bytes:
    """The first message to a worker."""
    return framed(pickle.dumps(setup))


def unframe(buffer: bytearray) -> bytes | None:
    """Take the first message out of a buffer; None while it is not all there."""
    if len(buffer) < _LENGTH.size:
        return None
    end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
    if len(buffer) < end:
        return None
    body = bytes(buffer[_LENGTH.size : end])
    del buffer[:end]
    return body


def _receive(pipe: BinaryIO) -> Any:
    """Wait for a message; None when the reward executor is gone."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    size = _LENGTH.unpack(head)[0]
    body = pipe.read(size)
    if len(body) == size:
        return pickle.loads(body)
    return None


def _send(pipe: BinaryIO, message: dict[str, Any]) -> None:
    pipe.write(framed(json.dumps(message).encode("ascii")))  # escapes halves of surrogate pairs
    pipe.flush()


def self_test(functions: Iterable[LoadedFunction]) -> str:
    """Compare known answers, if responses are to be; return "" or a sentence about a wrong verdict."""
    if not any(function.declared.gives_verdict for function in functions):
        return ""
    for gold, response, right in SELF_TEST:
        case = RewardInput("", response, gold, tokens=0, limit=0, truncated=False)
        if verdict(case) is not (Outcome.RIGHT if right else Outcome.WRONG):
            return (
                f"the comparison of answers fails its self-test: {response} is{'' if right else ' not'} "
                f"{gold}, but the comparison says otherwise"
            )
    return ""


def _bound_memory(extra_bytes: int) -> None:
    """Let this process grow by `extra_bytes` of address space from where it is, which Linux
    enforces."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _run(function: LoadedFunction, cases: Sequence[RewardInput]) -> dict[str, Any]:
    try:
        return {"scores": [(score.value, score.outcome) for score in function.score(cases)]}
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # what is left in this process may be torn or fill its memory
    except Exception as error:  # noqa: BLE001
        # a user's function may raise anything; counted, and too many stop the run
        return {"crash": f"{type(error).__name__}: {error}"[:WHY_CHARACTERS]}


class _Told(logging.Handler):
    """What reward functions log, kept for the reward executor: this process has no log of its own."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._lines) < MOST_LINES:
            self._lines.append(self.format(record)[:LINE_CHARACTERS])

    def take(self) -> list[str]:
        """Return and forget the lines."""
        lines = self._lines
        self._lines = []
        return lines


def serve(inbox: BinaryIO, outbox: BinaryIO) -> None:
    """Serve the reward executor until the inbox ends."""
    # Ctrl-C is for the reward executor, whose end is ours
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel kills; Python may be deep in C
    setup: Setup | None = _receive(inbox)
    if setup is None:
        return
    told = _Told()
    logging.getLogger("r1zero").addHandler(told)
    functions: dict[str, LoadedFunction] = {}
    try:
        functions = load_functions(setup.names, setup.settings)
        broken = self_test(functions.values())
    except BadInput as error:
        broken = str(error)
    declared = {each.name: asdict(each.declared) for each in functions.values()}
    _bound_memory(setup.memory_megabytes << 20)
    _send(outbox, {"broken": broken, "declared": declared})
    while (order := _receive(inbox)) is not None:
        for name in order.names:
            signal.setitimer(signal.ITIMER_REAL, setup.deadline_seconds)
            answer = _run(functions[name], order.cases)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(outbox, answer | {"told": told.take()})


def main() -> None:
    """Be a worker whose pipes are stdin and stdout."""
    inbox = os.fdopen(os.dup(0), "rb")
    outbox = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)  # what a library prints must not end up between messages
    serve(inbox, outbox)


if __name__ == "__main__":
    main()
