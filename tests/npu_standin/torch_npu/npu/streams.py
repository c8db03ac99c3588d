"""Streams and events of a device that does everything at once and in order: nothing has to wait.

What must be ordered is written down for NPUGraph, which knows an update that no one waits for.
"""

from __future__ import annotations

import contextlib
import time

from torch_npu.npu.graphs import refuse_to_wait


class Event:
    """A moment. Timed by the host's clock, since the device is never behind."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False, external=False):
        self._moment = None

    def record(self, stream=None):
        self._moment = time.perf_counter()

    def elapsed_time(self, end_event):
        """Milliseconds from this event to another."""
        return (end_event._moment - self._moment) * 1000

    def query(self):
        return True

    def wait(self, stream=None):
        pass

    def synchronize(self):
        refuse_to_wait()


class Stream:
    """The one order of all work."""

    npu_stream = 0

    def __init__(self, device=None, priority=0, **_):
        self.device = device

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def query(self):
        return True

    def wait_event(self, event):
        pass

    def wait_stream(self, stream):
        pass

    def synchronize(self):
        refuse_to_wait()


def current_stream(device=None):
    return Stream(device)


def default_stream(device=None):
    return Stream(device)


def set_stream(stream):
    pass


def stream(stream):
    return contextlib.nullcontext()


StreamContext = stream
