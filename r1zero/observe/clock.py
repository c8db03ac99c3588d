"""Timers of a step: named spans, on every rank, on the device's own clock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch

from r1zero.types import TimeSpan

T = TypeVar("T")


class Timer(Protocol):
    """Marks moments now and tells later when they were."""

    def mark(self) -> Any:
        """Mark this moment; nobody waits."""

    def read(self, marks: Sequence[Any]) -> list[float]:
        """When these moments were, in seconds since the epoch; waits until the last one is over."""


class Clock:
    """Collects the spans of one step.

    On a device a span is what it costs there: from when it comes to the span's work until it has
    done it. So a span that only queues work takes no time from the host, and still has the time
    that its work took.
    """

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._names: list[str] = []
        self._marks: list[Any] = []  # two for each name

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time a block. In a profiler's trace it has its name, too."""
        start = self._timer.mark()
        with torch.profiler.record_function(name):
            yield
        self._names.append(name)
        self._marks += [start, self._timer.mark()]

    def take(self) -> list[TimeSpan]:
        """Hand out the spans so far and start anew; the one time of a step that the device is
        waited for."""
        moments = self._timer.read(self._marks)
        spans = list(map(TimeSpan, self._names, moments[::2], moments[1::2]))
        self._names = []
        self._marks = []
        return spans


def seconds_by_name(spans: Sequence[TimeSpan]) -> dict[str, float]:
    """Add up the spans of each name."""
    seconds: dict[str, float] = {}
    for span in spans:
        seconds[span.name] = seconds.get(span.name, 0.0) + span.seconds
    return seconds
