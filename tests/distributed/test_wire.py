"""Samples as flat buffers: what comes out is what went in, without a copy."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from r1zero.distributed.wire import pack, pack_samples, unpack, unpack_samples
from r1zero.types import Group, Outcome, Prompt, Sample, Score

PROMPTS = [Prompt(10 + p, f"q{p}", np.arange(p, dtype=np.int32), "") for p in range(7)]


def drawn(length: int, **fields: object) -> Sample:
    """A sample of random tokens, as the engine makes it."""
    random = np.random.default_rng(length)
    tokens = random.integers(0, 2**31 - 1, length, dtype=np.int32)
    logprobs = -random.random(length, dtype=np.float32)
    return dataclasses.replace(Sample(tokens, logprobs, False, 3), **fields)


def plain(sample: Sample) -> dict:
    """Everything about a sample that travels, with the kinds of its numbers."""
    fields = {
        "counts": (sample.length, sample.counted),
        "truncated": sample.truncated,
        "version": sample.version,
        "reward": repr(sample.reward),  # so that not a number equals itself
        "right": sample.right,
        "scores": None if sample.score_values is None else sample.score_values.tolist(),
    }
    if not sample.trains:
        return fields | {"tokens": len(sample.tokens)}
    fields["mask"] = sample.mask.tolist()
    for name in ("tokens", "logprobs", "ref_logprobs"):
        array = getattr(sample, name)
        fields[name] = None if array is None else (array.dtype, array.tolist())
    return fields


def odd_mask(length: int) -> np.ndarray:
    return np.arange(length) % 3 != 1


SAMPLES = [
    drawn(5),
    drawn(0),
    drawn(9, truncated=True, version=2**40, reward=-1 / 3),
    drawn(8, loss_mask=odd_mask(8)),
    drawn(17, loss_mask=odd_mask(17), ref_logprobs=-np.arange(17, dtype=np.float32) / 7),
    drawn(0, loss_mask=np.zeros(0, bool), ref_logprobs=np.zeros(0, np.float32)),
    drawn(1, loss_mask=np.zeros(1, bool), version=-1, reward=1e300),
    drawn(3, ref_logprobs=np.array([-0.0, -np.inf, -1e-30], np.float32)),
]


def test_groups_come_out_as_they_went_in():
    groups = [
        Group(6, PROMPTS[6], SAMPLES[:3]),
        Group(2, PROMPTS[2], []),
        Group(1, PROMPTS[1], SAMPLES[3:]),
    ]
    found = unpack(pack(groups), PROMPTS)
    assert [(group.position, group.trains) for group in found] == [(6, True), (2, True), (1, True)]
    for group, original in zip(found, groups, strict=True):
        assert group.prompt is original.prompt
        assert list(map(plain, group.samples)) == list(map(plain, original.samples))


def test_what_is_not_learnt_from_travels_as_rows_alone():
    """All samples of a group that does not train, and one sample of another."""
    cut = dataclasses.replace(SAMPLES[4], trains=False)
    groups = [
        Group(0, PROMPTS[0], SAMPLES[2:5], trains=False),
        Group(3, PROMPTS[3], [SAMPLES[0], cut, SAMPLES[7]]),
    ]
    buffer = pack(groups)
    assert buffer.numel() == 8 + 2 * 40 + 8 + 6 * 48 + 5 * 8 + 3 * 12
    for again in (buffer, pack(unpack(buffer, PROMPTS))):
        dropped, kept = unpack(again, PROMPTS)
        assert (dropped.trains, kept.trains) == (False, True)
        for sample, original in zip(dropped.samples, SAMPLES[2:5], strict=True):
            assert not sample.trains and len(sample.tokens) == len(sample.logprobs) == 0
            assert (sample.length, sample.counted) == (original.length, original.counted)
            assert (sample.reward, sample.truncated) == (original.reward, original.truncated) or (
                math.isnan(original.reward)
            )
        assert [sample.trains for sample in kept.samples] == [True, False, True]
        assert plain(kept.samples[0]) == plain(SAMPLES[0])
        assert kept.samples[1].counted == cut.mask.sum() < cut.length == 17
        assert plain(kept.samples[2]) == plain(SAMPLES[7])


def test_samples_come_out_by_their_numbers():
    numbers = [40, 3, 5, 4, 0, 11, 12, 2]
    given = dict(zip(numbers, SAMPLES, strict=True))
    found = unpack_samples(pack_samples(given))
    assert list(found) == numbers, "in order"
    assert {n: plain(s) for n, s in found.items()} == {n: plain(s) for n, s in given.items()}


def test_nothing_is_a_message_too():
    assert unpack(pack([]), PROMPTS) == []
    assert unpack_samples(pack_samples({})) == {}


@pytest.mark.parametrize(
    ("sample", "size"),
    [
        (drawn(100), 8 + 48 + 100 * 8),
        (drawn(100, loss_mask=np.ones(100, bool)), 8 + 48 + 100 * 8),  # leaves nothing out
        (drawn(100, loss_mask=odd_mask(100)), 8 + 48 + 100 * 8 + 13),
        (drawn(100, ref_logprobs=np.zeros(100, np.float32)), 8 + 48 + 100 * 12),
        (drawn(100, scores={"acc": Score(1.0, Outcome.RIGHT, "x" * 1000)}), 8 + 48 + 100 * 8),
    ],
)
def test_a_buffer_has_its_arrays_and_little_else(sample, size):
    assert pack_samples({0: sample}).numel() == size
    assert pack([Group(0, PROMPTS[0], [sample])]).numel() == 8 + 40 + size


def test_arrays_are_views_of_the_buffer():
    buffer = pack_samples({0: SAMPLES[4]})
    sample = unpack_samples(buffer)[0]
    for array in (sample.tokens, sample.logprobs, sample.ref_logprobs):
        assert np.shares_memory(array, buffer.numpy())
        assert array.flags.aligned


@pytest.mark.parametrize("trains", [True, False])
def test_values_of_reward_functions_travel_where_samples_have_them(trains):
    given = {3: drawn(5, right=True), 8: drawn(0), 4: drawn(17)}
    for number, sample in given.items():
        sample.score_values = np.array([number, -0.25, 1 / 3])
        sample.trains = trains
    found = unpack_samples(pack_samples(given))
    for number, sample in found.items():
        assert sample.score_values.tolist() == [number, -0.25, 1 / 3]
        assert (sample.right, sample.trains) == (number == 3, trains)
        assert len(sample.tokens) == (given[number].length if trains else 0)
    assert pack_samples({0: drawn(1, score_values=np.zeros(3))}).numel() == 8 + 48 + 8 + 24


def test_scores_and_advantages_stay_where_they_are():
    sample = drawn(2, scores={"acc": Score(1.0, Outcome.RIGHT)}, advantage=0.5)
    (found,) = unpack_samples(pack_samples({0: sample})).values()
    assert found.scores == {} and math.isnan(found.advantage)
