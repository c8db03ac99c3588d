"""Continuous batching: who runs, who makes way, and what a sample keeps that waits again.

The order of preemption changes no sample, so only these tests see it.
"""

from __future__ import annotations

import numpy as np

from r1zero.rollout.scheduler import PartialSample, Queue, RunningBatch, SampleId


def begun(position: int, member: int) -> PartialSample:
    return PartialSample.fresh(SampleId(position, member), np.linspace(0, 1, 4, dtype=np.float32))


def test_samples_wait_in_the_order_of_the_batch_whenever_they_came() -> None:
    queue = Queue()
    for position, member in ((1, 0), (0, 1), (2, 0), (0, 0)):
        queue.put(SampleId(position, member))
    expected = [SampleId(0, 0), SampleId(0, 1), SampleId(1, 0), SampleId(2, 0)]
    assert queue.first(4) == expected
    assert [queue.take()[0] for _ in range(4)] == expected and len(queue) == 0


def test_the_last_in_the_order_makes_way_in_whatever_row_it_is() -> None:
    rows = RunningBatch(3)
    for position, member in ((0, 1), (2, 0), (1, 1)):
        rows.add(begun(position, member), 5, [position])
    assert rows.last() == 1
    gone, blocks = rows.remove(1)
    assert gone.sample_id == SampleId(2, 0) and blocks == [2]
    assert rows.count == 2 and rows.sequences[1].sample_id == SampleId(1, 1), "it moved there"
    assert rows.last() == 1


def test_a_sample_that_makes_way_keeps_its_tokens_and_goes_on_behind_them() -> None:
    rows = RunningBatch(1)
    rows.add(begun(3, 0), 5, [])
    rows.record([0], np.array([17]), np.array([-0.5], np.float32))
    queue = Queue()
    sample, _ = rows.remove(rows.last())
    queue.put(sample.sample_id, sample)
    sample_id, again = queue.take()
    assert again is sample and sample_id == SampleId(3, 0)
    assert again.count == 1 and again.tokens[0] == 17 and again.logprobs[0] == -0.5
    rows.add(again, 6, [])
    assert rows.newest[0] == 17, "the next input"
    assert rows.uniforms([0]) == np.float32(1 / 3), "its second number"
    assert queue.begun(sample_id) is None
