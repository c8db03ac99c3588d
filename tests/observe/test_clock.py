"""The clock: what spans say of a device that works behind its host, and that nobody waits for
it."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from support.multiproc import DEVICE, run_ranks
from support.worlds import make_runtime

from r1zero.distributed import device_timer
from r1zero.distributed.device_timer import EventTimer
from r1zero.observe.clock import Clock
from r1zero.observe.samples import sample_rows
from r1zero.step import train_step
from r1zero.types import Group, Prompt, Sample


class FakeDevice:
    """Plays torch.npu on a clock of its own: work is queued, and done one after the other. No
    device is here."""

    def __init__(self):
        self.host = 1000.0  # seconds since the epoch
        self.free_at = 0.0  # the end of what is queued
        self.synchronised = 0
        outer = self

        class Event:
            def __init__(self, enable_timing=False, blocking=False):
                assert enable_timing
                self.at = None

            def record(self, stream=None):
                self.at = max(outer.host, outer.free_at)

            def elapsed_time(self, end):
                assert max(self.at, end.at) <= outer.host, (
                    "an event that the device has not come to"
                )
                return (end.at - self.at) * 1000

        self.Event = Event

    def queue(self, seconds):
        self.free_at = max(self.host, self.free_at) + seconds

    def synchronize(self):
        self.synchronised += 1
        self.host = max(self.host, self.free_at)


@pytest.fixture
def fake(monkeypatch):
    made = FakeDevice()
    monkeypatch.setattr(device_timer, "device_module", lambda kind: made)
    monkeypatch.setattr(device_timer.time, "time", lambda: made.host)
    monkeypatch.setattr(device_timer.time, "perf_counter", lambda: made.host)
    return made


def test_spans_tell_what_the_device_did_and_the_host_goes_on(fake):
    clock, began = Clock(EventTimer("npu")), fake.synchronised
    with clock.span("update"):
        fake.queue(5.0)
    with clock.span("wait"):
        fake.host += 2.0  # the host waits for others, the device still updates
    with clock.span("publish"):
        fake.queue(1.5)
    assert fake.synchronised == began and fake.host == 1002.0
    spans = {span.name: (span.start, span.end) for span in clock.take()}
    assert fake.synchronised == began + 1
    assert spans == {
        "update": (1000.0, 1005.0),
        "wait": (1005.0, 1005.0),
        "publish": (1005.0, 1006.5),
    }
    assert clock.take() == []


def test_spans_of_an_idle_device_are_those_of_the_host(fake):
    clock = Clock(EventTimer("npu"))
    for _ in range(2):  # the second time from a clock that was set anew
        fake.host += 100.0
        start = fake.host
        with clock.span("reward"):
            fake.host += 3.0
        [span] = clock.take()
        assert (span.start, span.end) == (start, start + 3.0)


def test_a_device_whose_events_tell_no_time_leaves_that_of_the_host(fake):
    fake.Event.elapsed_time = lambda self, end: 0.0
    clock = Clock(EventTimer("npu"))
    fake.host += 50.0
    with clock.span("update"):
        fake.host += 3.0
    assert [(span.start, span.end) for span in clock.take()] == [(1050.0, 1053.0)]


def test_a_span_that_fails_is_none():
    clock = Clock(DEVICE.timer())
    with pytest.raises(ZeroDivisionError), clock.span("update"):
        _ = 1 / 0
    assert clock.take() == []


def test_setting_the_hosts_clock_does_not_bend_a_span(monkeypatch):
    clock, now = Clock(DEVICE.timer()), time.time()
    with clock.span("rollout"):
        monkeypatch.setattr(device_timer.time, "time", lambda: now + 3600)
        time.sleep(0.02)
    [span] = clock.take()
    assert 0.02 <= span.seconds < 5 and abs(span.start - now) < 5


def step_body(rank, size, store, folder):
    """One step, with a fake device's clock; returns what this rank keeps of it and how often the
    device was stopped."""
    runtime, fake = make_runtime(store, folder, rank=rank, size=size), FakeDevice()
    runtime.move.all_gather = lambda value: pytest.fail("this is for what all ranks read")
    runtime.start()
    device_timer.device_module = lambda kind: fake
    runtime.clock = Clock(EventTimer("npu"))
    before = fake.synchronised
    outcome = train_step(1, runtime)
    return outcome and len(outcome.records), fake.synchronised - before


def test_a_step_stops_the_device_once_and_only_the_controller_gets_its_records(tiny, tmp_path):
    found = run_ranks(step_body, 4, str(tmp_path))
    assert found == [(4, 1), (None, 1), (None, 1), (None, 1)]


def test_what_is_not_filled_yet_is_no_number():
    tokens = np.arange(3, dtype=np.int32)
    group = Group(
        4,
        Prompt(0, "", tokens, ""),
        [Sample(tokens, np.zeros(3, np.float32), False, 0) for _ in range(2)],
    )
    group.samples[1].reward = 1.0
    assert math.isnan(group.samples[0].reward) and math.isnan(group.samples[1].advantage)
    with pytest.raises(AssertionError, match=r"rewards of the prompt at position 4: \[nan, 1.0\]"):
        _ = group.rewards
    assert [row["advantage"] for row in sample_rows([group], str)] == [None, None], (
        "an evaluation has none"
    )
