"""Latent attention of the engine on NPUs, on the stand-in: by the fused operator and in captured graphs
the samples of a CPU, by PyTorch's operators where its sizes are refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from support.npu_process import on_npu
from support.shapes import small_shape

from r1zero.models.config import Experts, Latent, ModelConfig
from r1zero.rollout.block_attention import DecodeLayout, DecodeStep
from r1zero.rollout.decoder import Decoder
from r1zero.rollout.engine import EngineLimits, NativeEngine
from r1zero.rollout.interface import Sampling
from r1zero.rollout.kv_cache import BlockPool, SampleBlocks
from r1zero.rollout.npu_graphs import DecodeGraphs
from r1zero.rollout.operators import Operators
from r1zero.types import Batch, Prompt

BLOCK = 16
EXACT = 1e-5  # of log-probs in fp32
FUSED = "npu_fused_infer_attention_score_v2"


def latent_shape(heads: int, rank: int = 512, rope_dim: int = 64) -> ModelConfig:
    """A dense layer and one of experts in groups, with latent attention of these sizes."""
    latent = Latent(query_latent=24, rank=rank, nope_dim=16, rope_dim=rope_dim, value_dim=12)
    experts = Experts(
        count=8,
        top_k=4,
        ffn_hidden_size=32,
        layers=(1,),
        scores="sigmoid",
        groups=4,
        top_k_groups=2,
        scale=2.5,
        shared_ffn_size=32,
    )
    return small_shape(
        family="deepseek_v3",
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=latent.query_dim,
        qkv_bias=False,
        latent=latent,
        experts=experts,
    )


REAL = latent_shape(4)
ODD = latent_shape(3)  # which the fused operator does not take
TINY = latent_shape(3, rank=16, rope_dim=8)  # nor these


@dataclass
class Drawn:
    """Samples of a batch, and what was called."""

    tokens: list[list[int]]
    logprobs: list[np.ndarray]
    routes: list[list[int]]
    fused: int = 0  # calls of the fused operator, outside of replays
    replays: int = 0


def decoder_on(device: str, shape: ModelConfig, dtype: torch.dtype, graphs: bool) -> Decoder:
    decoder = Decoder(shape, 1, None, dtype, torch.device(device), 96, graphs=graphs)
    torch.manual_seed(5)
    for name, weight in decoder.weights.items():
        if "norm" in name:
            weight.copy_(torch.rand(weight.shape) + 0.5)
        else:
            weight.copy_(torch.randn(weight.shape) * 0.15)
    return decoder


def drawn_by(decoder: Decoder) -> Drawn:
    """All samples of two batches. The second one is larger, so that the cache moves; prompts of a
    group share blocks, and rows come as others leave."""
    engine = NativeEngine(decoder, (3,), EngineLimits(40, 10**6, 5, block=BLOCK))
    engine.weights().commit(0)
    drawn = Drawn([], [], [])
    for step, count in enumerate((2, 4), start=1):
        ids = [np.arange(4, 12 + 9 * number, dtype=np.int32) for number in range(count)]
        prompts = [Prompt(number, "", tokens, "") for number, tokens in enumerate(ids)]
        batch = Batch(step, 0, prompts, 3, 3 * count, keeps_routes=True)
        engine.submit(batch, range(count), Sampling(1.0, 1.0, 0, 7))
        for group in engine.collect(batch.everything):
            for sample in group.samples:
                drawn.tokens.append(sample.tokens.tolist())
                drawn.logprobs.append(sample.logprobs)
                drawn.routes.append(sample.routes.flatten().tolist())
    return drawn


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How often the fused operator is called, and graphs are replayed, within."""
    import torch_npu

    seen = {"fused": 0, "replays": 0}

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[name] += 1
            return function(*args, **kwargs)

        return call

    graph = torch_npu.npu.NPUGraph
    with (
        patch.object(torch_npu, FUSED, counting("fused", getattr(torch_npu, FUSED))),
        patch.object(graph, "replay", counting("replays", graph.replay)),
    ):
        yield seen


def drawn_on_npu(shape: ModelConfig, graphs: bool, dtype: torch.dtype) -> Drawn:
    """In fp32, which the hardware refuses, limits of operators only warn."""
    from torch_npu import _bodies

    only_warns = dtype == torch.float32
    with patch.object(_bodies, "_only_warns", only_warns), counted() as seen:
        drawn = drawn_by(decoder_on("npu", shape, dtype, graphs))
    drawn.fused = seen["fused"]
    drawn.replays = seen["replays"]
    return drawn


def drawn_on_cpu(shape: ModelConfig) -> Drawn:
    return drawn_by(decoder_on("cpu", shape, torch.float32, graphs=False))


def assert_same(found: Drawn, expected: Drawn) -> None:
    assert found.tokens == expected.tokens and len(found.tokens) == 18
    assert found.routes == expected.routes
    for mine, its in zip(found.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(mine, its, rtol=0, atol=EXACT)


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
@pytest.mark.parametrize("shape", [REAL, ODD], ids=["4 heads", "3 heads"])
def test_the_fused_operator_draws_the_samples_of_a_cpu(shape, graphs):
    found = on_npu(drawn_on_npu, shape, graphs, torch.float32)
    assert_same(found, drawn_on_cpu(shape))
    if graphs:
        assert found.replays > 50
        assert found.fused == 2 * 2 * 2, "tried, then captured, for two caches, in two layers"
    else:
        assert found.replays == 0 and found.fused > 2 * 50


@pytest.mark.parametrize("shape", [REAL, ODD], ids=["4 heads", "3 heads"])
def test_in_bf16_nothing_is_refused_and_graphs_draw_the_same(shape):
    captured = on_npu(drawn_on_npu, shape, True, torch.bfloat16)
    plain = on_npu(drawn_on_npu, shape, False, torch.bfloat16)
    assert captured.tokens == plain.tokens and captured.routes == plain.routes
    assert captured.replays > 50 and plain.fused > 2 * 50


def test_sizes_that_it_refuses_run_by_pytorchs_operators_without_graphs():
    found = on_npu(drawn_on_npu, TINY, True, torch.float32)
    assert_same(found, drawn_on_cpu(TINY))
    assert found.fused == found.replays == 0


def captures(shape: ModelConfig) -> tuple[bool, int]:
    decoder = decoder_on("npu", shape, torch.bfloat16, graphs=True)
    return isinstance(decoder._step, DecodeGraphs), decoder.padding


def test_graphs_are_for_what_the_fused_operator_takes():
    captured, padding = on_npu(captures, ODD)
    assert captured and padding > 0
    assert on_npu(captures, TINY) == (False, 0)


def step_in(decoder: Decoder, by_pytorch: bool) -> list[torch.Tensor]:
    """One step of three rows in a cache of random numbers: hidden states and the whole cache."""
    operators = Operators(decoder.operators.heads) if by_pytorch else decoder.operators
    pool = BlockPool(
        decoder.shape, decoder.kv_heads, decoder.dtype, decoder.device, BLOCK, operators.token_major
    )
    pool.reserve(8)
    torch.manual_seed(2)
    pool.keys.copy_(torch.randn(pool.keys.shape))
    pool.values.copy_(torch.randn(pool.values.shape))
    shared = pool.take_shared(1)
    rows = [
        SampleBlocks(0, [], pool.take_own(1)),
        SampleBlocks(1, shared, pool.take_own(2)),
        SampleBlocks(1, shared, pool.take_own(1)),
    ]
    layout = DecodeLayout(rows, pool, 3, decoder.heads, decoder.device)
    step = DecodeStep(layout, np.array([0, 35, 16]))
    tokens = torch.tensor([5, 6, 7]).to(decoder.device)
    with torch.inference_mode(), patch.object(decoder, "operators", operators):
        hidden = decoder._decode(tokens, step).hidden
    return [x.float().cpu() for x in (hidden, pool.keys, pool.values)]


def step_by_both() -> tuple[list[float], list[bool]]:
    """Largest differences of a fused step to one by PyTorch's operators, and whether the caches
    differ from what they were in the same places."""
    decoder = decoder_on("npu", ODD, torch.bfloat16, graphs=False)
    fused = step_in(decoder, by_pytorch=False)
    plain = step_in(decoder, by_pytorch=True)
    torch.manual_seed(2)
    before = [torch.randn(x.shape).bfloat16().float() for x in plain[1:]]
    differences = [float((x - y).abs().max()) for x, y in zip(fused, plain, strict=True)]
    same_places = []
    for mine, its, was in zip(fused[1:], plain[1:], before, strict=True):
        places = (mine != was).any(-1)
        assert int(places.sum()) == 3 * decoder.shape.num_layers
        same_places.append(torch.equal(places, (its != was).any(-1)))
    return differences, same_places


def test_a_step_writes_latents_and_keys_to_their_places():
    differences, same_places = on_npu(step_by_both)
    assert all(same_places)
    hidden, keys, latents = differences
    assert max(hidden, keys, latents) < 1e-1, "roundings of bf16"
