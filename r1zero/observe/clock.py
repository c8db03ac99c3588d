"""Named spans of a step, on every rank."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Span:
    """`name` ran from `start` to `end`, in seconds since the epoch."""

    name: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Clock:
    """Collects the spans of one step. `synchronize` waits for the device, so that spans tell the truth."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.spans: list[Span] = []
        self._synchronize = synchronize

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = time.time()
        yield
        self._synchronize()
        self.spans.append(Span(name, start, time.time()))

    def time(self, name: str, function: Callable[..., T], *args: Any) -> T:
        """Time one call."""
        with self.span(name):
            return function(*args)

    def take(self) -> list[Span]:
        """Hand out the spans so far and start anew."""
        spans, self.spans = self.spans, []
        return spans
