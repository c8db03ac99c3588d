"""Timing by device events (torch.cuda.Event, torch.npu.Event), or by the host's clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from r1zero.distributed.torch_modules import device_module


class HostTimer:
    """Moments of a process that computes by itself. A clock that is set meanwhile does not bend
    them."""

    def __init__(self) -> None:
        self._set()

    def mark(self) -> float:
        """Mark this moment."""
        return time.perf_counter()

    def read(self, marks: Sequence[float]) -> list[float]:
        """When these moments were, in seconds since the epoch."""
        moments = [self._epoch + mark for mark in marks]
        self._set()
        return moments

    def _set(self) -> None:
        self._epoch = time.time() - time.perf_counter()


class EventTimer:
    """Moments of a device: events in its queue, which it passes when it has done what was queued
    before them."""

    def __init__(self, kind: str) -> None:
        """`kind` is "npu" or "cuda"."""
        self._module = device_module(kind)
        self._host = HostTimer()
        self._module.synchronize()
        self._set()

    def mark(self) -> tuple[float, Any]:
        """Queue an event."""
        return self._host.mark(), self._event()

    def read(self, marks: Sequence[tuple[float, Any]]) -> list[float]:
        """Wait for the device; when it passed these events, in seconds since the epoch."""
        self._module.synchronize()
        queued = self._host.read([moment for moment, _ in marks])
        passed = [self._epoch + self._first.elapsed_time(event) / 1000 for _, event in marks]
        self._set()
        # no event is passed before it is queued, though clocks drift apart
        return list(map(max, queued, passed))

    def _event(self) -> Any:
        event = self._module.Event(enable_timing=True)
        event.record()
        return event

    def _set(self) -> None:
        """Tie the device's time to the host's; the device is idle."""
        self._first = self._event()
        self._epoch = time.time()
