"""The engine where memory is short, its products on processors without bf16, and its benchmark's
input."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.shapes import small_shape
from support.tool import run_here

from r1zero.algo.parts import cut_parts
from r1zero.rollout.decoder import Decoder
from r1zero.rollout.engine import EngineLimits, NativeEngine
from r1zero.rollout.interface import EngineListener, RolloutProgress, Sampling
from r1zero.types import ANY_LENGTH, Batch, Part, Prompt

SHAPE = small_shape(
    family="qwen3",
    hidden_size=32,
    ffn_hidden_size=48,
    vocab_size=64,
    max_positions=512,
    qkv_bias=False,
    qk_norm=True,
)
EVERYTHING = Part(range(10), range(ANY_LENGTH))
CPU = torch.device("cpu")
SAMPLING = Sampling(1.0, 1.0, 0, 7)


def generate(limits, prompt_length, group_size, prompts):
    """Samples without end, so that all need their whole budget; returns their tokens and the
    engine."""
    decoder = Decoder(SHAPE, 1, None, torch.float32, CPU, 512)
    torch.manual_seed(0)
    for weight in decoder.weights.values():
        weight.normal_(0, 0.3)
    engine = NativeEngine(decoder, (), limits)
    engine.weights().commit(0)
    tokens = np.arange(1, 1 + prompt_length, dtype=np.int32)
    texts = [Prompt(i, "", tokens + i, "") for i in range(prompts)]
    batch = Batch(1, 0, texts, group_size, group_size * prompts)
    engine.submit(batch, range(prompts), SAMPLING)
    return [
        sample.tokens.tolist() for group in engine.collect(EVERYTHING) for sample in group.samples
    ], engine


def test_samples_that_need_their_next_block_together_in_a_cache_for_one():
    """The last ones make way, the first goes on: nobody makes way for a sample that has itself made
    way."""
    expected, _ = generate(EngineLimits(8, 10**6), 8, 3, 2)
    found, engine = generate(EngineLimits(8, 1, block=4), 8, 3, 2)
    assert found == expected and engine.preemptions
    assert engine._pool.num_free == engine._pool.num_blocks


def test_a_request_may_give_each_sample_its_own_budget():
    """Shorter samples are the beginnings of the longer ones: a budget changes no draw."""
    whole, engine = generate(EngineLimits(8, 10**6), 8, 3, 2)
    batch = Batch(1, 0, [group.prompt for group in engine.collect(EVERYTHING)], 3, 6)
    budgets = np.array([[8, 1, 3], [2, 5, 8]])
    engine.submit(batch, [0, 1], SAMPLING, budgets)
    found = [sample for group in engine.collect(EVERYTHING) for sample in group.samples]
    assert [sample.tokens.tolist() for sample in found] == [
        tokens[:budget] for tokens, budget in zip(whole, budgets.flatten(), strict=True)
    ]
    assert all(sample.truncated for sample in found)
    with pytest.raises(AssertionError, match="budgets out of bounds"):
        engine.submit(batch, [0, 1], SAMPLING, budgets + 1)


@pytest.mark.parametrize(
    "limits",
    [EngineLimits(8, 10**6), EngineLimits(8, 10**6, max_running=4), EngineLimits(8, 1, block=4)],
    ids=["all at once", "four at a time", "a cache for one, in which samples make way"],
)
def test_parts_hold_what_their_lengths_say_and_end_when_they_are_known(limits):
    """The samples of a part are those of the whole; nobody draws their longer neighbours to the end
    for it."""
    budgets = np.array([[2, 1, 3], [2, 5, 8], [4, 4, 4], [1, 1, 1]])
    _, engine = generate(limits, 8, 3, 4)
    batch = Batch(1, 0, [group.prompt for group in engine.collect(EVERYTHING)], 3, 12)
    engine.submit(batch, range(4), SAMPLING, budgets)
    whole = {group.position: group.samples for group in engine.collect(batch.everything)}
    parts = cut_parts(4, 1, [3, 4, 6])
    engine.submit(batch, range(4), SAMPLING, budgets)
    found = []
    for part in parts:
        found.append([group.position for group in engine.collect(part)])
        if len(found) == 1 and limits.max_running is None and limits.block is None:
            assert engine.progress().tokens == 6 + 2 + 4 + 4 + 3 * 4 + 3
    assert found == [[0, 3], [2], [], [1]]
    for position, group in engine._groups.items():
        for one, other in zip(group.samples, whole[position], strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()


def test_sampling_is_that_of_the_request():
    """A greedy request between two others leaves no trace in them."""
    whole, engine = generate(EngineLimits(8, 10**6), 8, 3, 2)
    batch = Batch(1, 0, [group.prompt for group in engine.collect(EVERYTHING)], 3, 6)

    def ask(sampling):
        engine.submit(batch, [0, 1], sampling)
        return [
            sample.tokens.tolist()
            for group in engine.collect(EVERYTHING)
            for sample in group.samples
        ]

    greedy = ask(Sampling(1.0, 1.0, 1, 7))
    assert greedy[0] == greedy[1] == greedy[2] != whole[0]
    assert ask(SAMPLING) == whole


def test_listeners_are_told_in_their_order_and_until_they_are_removed():
    _, engine = generate(EngineLimits(8, 10**6), 8, 3, 2)
    batch = Batch(1, 0, [group.prompt for group in engine.collect(EVERYTHING)], 3, 6)
    told = []

    def listener(name):
        return EngineListener(
            lambda group, member: told.append((name, group.position, member)),
            lambda: told.append((name, "step")),
        )

    first = listener("first")
    engine.listeners += [first, listener("second")]
    engine.submit(batch, [0, 1], SAMPLING)
    engine.collect(EVERYTHING)
    names = [name for name, *_ in told]
    assert names == ["first", "second"] * (len(told) // 2)
    samples = {tuple(what) for _, *what in told if what != ["step"]}
    assert samples == {(position, member) for position in (0, 1) for member in (0, 1, 2)}
    assert engine.progress() == RolloutProgress(done=6, total=6, longest=0, tokens=48)
    engine.listeners.remove(first)
    told.clear()
    engine.submit(batch, [0], SAMPLING)
    engine.collect(EVERYTHING)
    assert {name for name, *_ in told} == {"second"}


def test_samples_are_signed_by_the_weights_and_not_by_the_plan():
    """An engine that missed a publication draws on, and its samples say with what."""
    _, engine = generate(EngineLimits(8, 10**6), 8, 3, 2)
    engine.weights().commit(5)
    batch = Batch(2, 6, [Prompt(0, "", np.arange(1, 9, dtype=np.int32), "")], 3, 3)
    engine.submit(batch, [0], SAMPLING)
    assert {sample.version for group in engine.collect(EVERYTHING) for sample in group.samples} == {
        5
    }


def test_weights_do_not_change_under_samples_that_are_being_drawn():
    _, engine = generate(EngineLimits(8, 10**6), 8, 3, 2)
    batch = Batch(2, 0, [Prompt(0, "", np.arange(1, 9, dtype=np.int32), "")], 3, 3)
    engine.submit(batch, [0], SAMPLING)
    with pytest.raises(AssertionError, match="while samples are drawn"):
        engine.weights().commit(1)


def test_bf16_on_a_processor_that_onednn_has_no_bf16_for():
    code = (
        "import torch; from r1zero.rollout.linear import Linear; x = torch.eye(3).bfloat16(); "
        "linear = Linear(x); linear.prepare(); assert torch.equal(linear(x), x)"
    )
    environment = {
        **os.environ,
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize(
    ("lengths", "sentence"),
    [
        ("fixed:0", "fixed:0 must give lengths of at least 1"),
        ("absent.txt", "absent.txt is neither fixed:N"),
    ],
)
def test_the_benchmark_refuses_lengths_that_are_none(lengths, sentence, capsys):
    assert run_here("bench_rollout.py", "--lengths", lengths) == 2
    assert sentence in capsys.readouterr().err
