"""Replicas of the engine that share experts: the samples of one that has all of them, and nobody waits
for what nobody sends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.models import make_model
from support.multiproc import run_ranks
from support.worlds import make_world

from r1zero.models.config import ModelConfig
from r1zero.models.params import ShardIndex, Shards, param_table
from r1zero.rollout import expert_replicas
from r1zero.rollout.decoder import Decoder
from r1zero.rollout.engine import EngineLimits, NativeEngine
from r1zero.rollout.expert_replicas import ExpertReplicas
from r1zero.rollout.interface import EngineListener, Sampling
from r1zero.types import ANY_LENGTH, Batch, Part, Prompt
from r1zero.weights.open import open_weights

EXACT = 1e-5  # of log-probs in fp32
CPU = torch.device("cpu")
SAMPLING = Sampling(0.7, 1.0, 0, seed=5)
AMPLE = EngineLimits(24, 10**6)
SCARCE = EngineLimits(24, 60, None, 7, 4)  # a tenth of the tokens, prompts in pieces of 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of two models of four layers, one of them dense, with 8 experts and with 16."""
    found = {}
    for name in ("qwen3_moe", "deepseek_v3"):
        found[name] = str(tmp_path_factory.mktemp(name))
    make_model("qwen3_moe", found["qwen3_moe"], mlp_only_layers=[1])
    make_model("deepseek_v3", found["deepseek_v3"])
    return found


def engine_on(folder, limits=AMPLE, grid=None):
    """An engine with the model's weights in fp32: alone, or on a rank of `grid`."""
    shape = ModelConfig.from_folder(folder)
    if grid is None:
        decoder = Decoder(shape, 1, None, torch.float32, CPU, 128)
        index = ShardIndex()
        shards = Shards()
    else:
        replicas = ExpertReplicas(grid) if grid.span.experts_span_replicas else None
        tp = grid.span.tp
        group = grid.groups["tp"]
        decoder = Decoder(shape, tp, group, torch.float32, CPU, 128, replicas=replicas)
        index = ShardIndex(grid.tp_index, grid.expert_index)
        shards = Shards.of_grid(grid.span)
    weights = open_weights(folder, shape)
    for tensor, part in weights.stream(param_table(shape), index, shards, torch.float32):
        decoder.weights[tensor.name].copy_(part)
    engine = NativeEngine(decoder, (2, 9, 40), limits)
    engine.weights().commit(4)
    return engine


def length_set(number):
    """A batch in two parts or three, and how long each sample may become: some replicas get nothing,
    little, or all of the long ones."""
    random = np.random.default_rng(number)
    count = int(random.integers(1, 8))
    prompts = []
    for position in range(count):
        tokens = random.integers(3, 512, int(random.integers(1, 40)), dtype=np.int32)
        prompts.append(Prompt(position, "", tokens, ""))
    cut = int(random.integers(0, count + 1))
    short = range(int(random.integers(2, 12)))
    parts = [
        Part(range(cut), short),
        Part(range(cut), range(short.stop, ANY_LENGTH)),
        Part(range(cut, count), range(ANY_LENGTH)),
    ]
    parts = tuple(part for part in parts if part.positions)
    batch = Batch(2, 4, prompts, 2, 2, planned_parts=parts, keeps_routes=True)
    budgets = random.integers(1, 17, (count, 2))
    budgets[random.random(count) < 0.4] = 1  # a prompt whose responses end at once
    return batch, budgets


def generate(engine, number, share=None):
    """All groups of a set, or those of a replica's share of its positions."""
    batch, budgets = length_set(number)
    positions = batch.positions
    if share is not None:
        positions = share(positions)
    engine.submit(batch, positions, SAMPLING, budgets)
    groups = []
    for part in batch.parts:
        groups += engine.collect(part)
    assert sorted(group.position for group in groups) == list(positions)
    return {group.position: group for group in groups}


def assert_equal(group, its):
    """The same samples, through the same experts."""
    np.testing.assert_array_equal(group.prompt_routes, its.prompt_routes)
    for sample, other in zip(group.samples, its.samples, strict=True):
        np.testing.assert_array_equal(sample.tokens, other.tokens)
        np.testing.assert_array_equal(sample.routes, other.routes)
        np.testing.assert_allclose(sample.logprobs, other.logprobs, rtol=0, atol=EXACT)


def replicas_body(rank, size, store, folder, tp, ep, limits, sets):
    """This rank's groups of each set, how many experts it holds, and how often a sample made way."""
    if limits is SCARCE:
        expert_replicas.EXCHANGED_TOKENS = 16  # a pass takes several exchanges
    grid = make_world(rank, size, store, (1, 1), rollout=tp, rollout_ep=ep).rollout
    engine = engine_on(folder, limits, grid)

    def share(positions):
        return grid.span.share(grid.replica, positions)

    found = [generate(engine, number, share) for number in sets]
    held = engine.decoder.weights["decoder.layers.3.mlp.experts.linear_fc2.weight"]
    return found, len(held), engine.preemptions


# model, processes, TP, EP, limits, and which sets
LAYOUTS = {
    "4 ranks, EP4": ("qwen3_moe", 4, 1, 4, AMPLE, range(20)),
    "4 ranks, TP2 EP4, scarce memory": ("qwen3_moe", 4, 2, 4, SCARCE, range(15, 19)),
    "8 ranks, TP2 EP4": ("qwen3_moe", 8, 2, 4, AMPLE, range(1)),
    "8 ranks, latent attention, TP2 EP8": ("deepseek_v3", 8, 2, 8, AMPLE, range(1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_and_experts_are_those_of_one_rank(folders, layout):
    model, ranks, tp, ep, limits, sets = LAYOUTS[layout]
    folder = folders[model]
    alone = engine_on(folder)
    expected = [generate(alone, number) for number in sets]
    found = run_ranks(replicas_body, ranks, folder, tp, ep, limits, sets)
    for number, whole in enumerate(expected):
        seen = []
        for groups, _, _ in found:
            for position, group in groups[number].items():
                assert_equal(group, whole[position])
                seen.append(position)
        assert sorted(seen) == sorted([*whole] * tp), "each on the ranks of one replica"
    count = ModelConfig.from_folder(folder).experts.count
    assert [held for _, held, _ in found] == [count // ep] * ranks
    assert limits is AMPLE or any(preempted for _, _, preempted in found)


def passes_body(rank, size, store, folder, budgets):
    """What two replicas that take turns draw in two parts, of which the first has two samples, and in
    which passes."""
    grid = make_world(rank, size, store, (1, 1), rollout_ep=2).rollout
    engine = engine_on(folder, AMPLE, grid)
    passes = []
    begin = engine.decoder.replicas.begin

    def begin_and_tell(tokens, device):
        found = begin(tokens, device)
        passes.append((tokens, engine.decoder.replicas.anyone_waits))
        return found

    engine.decoder.replicas.begin = begin_and_tell
    steps = []
    engine.listeners.append(EngineListener(on_step=lambda: steps.append(len(passes))))
    count = len(budgets)
    prompts = [Prompt(n, "", np.arange(3, 8, dtype=np.int32), "") for n in range(count)]
    parts = (Part(range(2), range(ANY_LENGTH)), Part(range(2, count), range(ANY_LENGTH)))
    batch = Batch(2, 4, prompts, 1, 1, planned_parts=parts)
    engine._end_ids = np.asarray([])  # so that budgets are lengths
    engine.submit(batch, range(rank, count, 2), SAMPLING, np.array(budgets)[:, None])
    lengths = []
    for part in batch.parts:
        lengths.append([len(group.samples[0].tokens) for group in engine.collect(part)])
    return lengths, passes, len(steps)


def test_who_is_through_serves_until_nobody_waits(folders):
    """The first replica has prompts 0 and 2, with 9 tokens and 2, the second prompt 1, with one token."""
    first, second = run_ranks(passes_body, 2, folders["qwen3_moe"], [9, 1, 2])
    assert first[0] == [[9], [2]]
    assert second[0] == [[1], []]
    # Two prompts and eight decoding steps; nothing is left for the second part. Each collect ends by
    # asking once.
    assert first[1] == [(10, True), (2, True), *[(1, True)] * 7, (0, False), (0, False)]
    assert second[1] == [(5, True), *[(0, True)] * 8, (0, False), (0, False)]
    assert second[2] == 9, "those who listen are called while it serves"


def test_who_is_through_draws_samples_of_later_parts_until_nobody_waits(folders):
    """As above, and the second replica also has prompt 3, with 15 tokens."""
    first, second = run_ranks(passes_body, 2, folders["qwen3_moe"], [9, 1, 2, 15])
    assert first[0] == [[9], [2]]
    assert second[0] == [[1], [15]]
    # It draws ten tokens while the first one is at its nine, the last of them before it hears that
    # nobody waits, and the other five when they are asked for.
    ahead = [*[(1, True)] * 8, (1, False), (0, False)]
    assert second[1] == [(10, True), *ahead, *[(1, True)] * 5, (0, False)]
    assert first[1][-8:] == [(0, False), (0, False), *[(0, True)] * 5, (0, False)]


def test_true_tokens_of_a_pass_in_slices(monkeypatch):
    monkeypatch.setattr(expert_replicas, "EXCHANGED_TOKENS", 6)
    found = expert_replicas._slices([5, 2, 0], CPU)
    cut = [(piece.first, piece.width, piece.true.tolist()) for piece in found]
    assert cut == [(0, 2, [0, 1, 2, 3]), (2, 2, [0, 1]), (4, 1, [0])]
    assert expert_replicas._slices([2, 2], CPU)[0].true is None
    assert expert_replicas._slices([0, 0], CPU) == []
