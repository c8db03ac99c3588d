"""Decoding steps captured as NPU graphs, on the stand-in: the same tokens as without, whatever comes
and goes."""

from __future__ import annotations

import numpy as np
import torch
from support.npu_process import on_npu
from support.shapes import small_shape

from r1zero.rollout import npu_graphs
from r1zero.rollout.block_attention import DecodeLayout, DecodeStep
from r1zero.rollout.decoder import Decoder
from r1zero.rollout.engine import EngineLimits, NativeEngine
from r1zero.rollout.interface import Sampling
from r1zero.rollout.kv_cache import BlockPool, SampleBlocks
from r1zero.types import Batch, Prompt


def drawn_tokens(graphs: bool) -> tuple[list[list[int]], int]:
    """Three batches, so that graphs outlive a batch; the second is larger, so that the cache moves;
    rows come and go. Returns all samples, and how often a graph was replayed."""
    import torch_npu

    replays = []
    replay = torch_npu.npu.NPUGraph.replay
    torch_npu.npu.NPUGraph.replay = lambda graph: (replays.append(graph), replay(graph))
    device = torch.device("npu")
    decoder = Decoder(small_shape(), 1, None, torch.bfloat16, device, 96, graphs=graphs)
    torch.manual_seed(5)
    for weight in decoder.weights.values():
        weight.copy_(torch.randn(weight.shape) * 0.2)
    engine = NativeEngine(decoder, (3,), EngineLimits(48, 10**6, max_running=5, block=16))
    engine.weights().commit(0)
    samples = []
    for step, count in ((1, 3), (2, 6), (3, 6)):
        ids = [np.arange(4, 9 + 5 * number, dtype=np.int32) for number in range(count)]
        prompts = [Prompt(number, "", tokens, "") for number, tokens in enumerate(ids)]
        batch = Batch(step, 0, prompts, 3, 3 * count)
        engine.submit(batch, range(count), Sampling(1.0, 1.0, 0, 7))
        for group in engine.collect(0):
            samples += [sample.tokens.tolist() for sample in group.samples]
    torch_npu.npu.NPUGraph.replay = replay
    return samples, len(replays)


def test_captured_decoding_steps_draw_the_same_samples():
    captured, replays = on_npu(drawn_tokens, True)
    plain, none = on_npu(drawn_tokens, False)
    assert captured == plain and len(plain) == 45
    assert replays > 20 and none == 0


def test_a_cache_that_grows_where_it_lay_is_captured_anew(monkeypatch):
    """An allocator may give the same address again; the layers behind the first one lie elsewhere
    all the same."""
    captured = []
    monkeypatch.setattr(npu_graphs, "capture_graph", lambda run: (captured.append(run), run()))
    monkeypatch.setattr(npu_graphs, "replay_graph", lambda graph, lengths: None)
    shape = small_shape()
    arena = torch.zeros(2 * 20 * 2 * 4 * 16)
    decode = npu_graphs.DecodeGraphs(lambda tokens, step: tokens.float()[:, None], 32)
    for blocks in (10, 20):
        pool = BlockPool(shape, 2, torch.float32, torch.device("cpu"), block=4)
        pool.num_blocks, pool.keys = (
            blocks,
            arena[: 2 * blocks * 2 * 4 * 16].view(2, blocks, 2, 4, 16),
        )
        step = DecodeStep(
            DecodeLayout([SampleBlocks(0, [], [1])], pool, 1, 4, torch.device("cpu")), np.array([2])
        )
        for _ in range(npu_graphs.WORTH_CAPTURING + 1):
            decode(torch.tensor([5]), step)
    assert len(captured) == 2
