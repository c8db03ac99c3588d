"""Decoding steps captured as NPU graphs, on the stand-in: the same tokens as without, whatever comes
and goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.npu_process import on_npu
from support.shapes import small_shape

from r1zero.distributed.placement import RankGrid
from r1zero.models.config import Experts, ModelConfig
from r1zero.rollout.block_attention import DecodeLayout, DecodeStep, PassOutput
from r1zero.rollout.decoder import Decoder
from r1zero.rollout.engine import EngineLimits, NativeEngine
from r1zero.rollout.interface import EngineConfig, EngineSetup, Sampling
from r1zero.rollout.kv_cache import BlockPool, SampleBlocks
from r1zero.rollout.npu_graphs import SIZES, DecodeGraphs
from r1zero.types import Batch, Prompt

BLOCK = 16


@contextmanager
def calls() -> Iterator[list[str]]:
    """What is called of graphs and their events within, in order."""
    import torch_npu

    npu = torch_npu.npu
    seen: list[str] = []
    watched = {
        npu.NPUGraph: ("update", "replay"),
        npu.Event: ("record", "synchronize"),
        npu.graph: ("__enter__",),
    }
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in watched.items():
            for name in names:
                patch.setattr(owner, name, noted(getattr(owner, name), seen))
        yield seen


def noted(method: Any, seen: list[str]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(method.__name__)
        return method(*args, **kwargs)

    return call


DENSE = small_shape()
MIXTURE = small_shape(
    family="qwen3_moe",
    qk_norm=True,
    qkv_bias=False,
    experts=Experts(count=4, top_k=2, ffn_hidden_size=32, layers=(1,)),
)


def decoder_on_npu(graphs: bool, shape: ModelConfig = DENSE) -> Decoder:
    device = torch.device("npu")
    decoder = Decoder(shape, 1, None, torch.bfloat16, device, 96, graphs=graphs)
    torch.manual_seed(5)
    for weight in decoder.weights.values():
        weight.copy_(torch.randn(weight.shape) * 0.2)
    return decoder


def drawn_tokens(
    graphs: bool,
    max_running: int,
    shape: ModelConfig = DENSE,
    budget: int = 48,
    counts: Sequence[int] = (3, 6, 6),
) -> tuple[list[list[int]], list[str]]:
    """All samples of batches of so many prompts, each with the experts of its tokens, and what was
    called: graphs outlive a batch, and the second one is larger, so that the cache moves."""
    limits = EngineLimits(budget, 10**6, max_running, block=BLOCK)
    engine = NativeEngine(decoder_on_npu(graphs, shape), (3,), limits)
    engine.weights().commit(0)
    samples = []
    with calls() as seen:
        for step, count in enumerate(counts, start=1):
            ids = [np.arange(4, 9 + 5 * number, dtype=np.int32) for number in range(count)]
            prompts = [Prompt(number, "", tokens, "") for number, tokens in enumerate(ids)]
            batch = Batch(step, 0, prompts, 3, 3 * count, keeps_routes=True)
            engine.submit(batch, range(count), Sampling(1.0, 1.0, 0, 7))
            for group in engine.collect(batch.everything):
                for sample in group.samples:
                    routes = [] if sample.routes is None else sample.routes.flatten().tolist()
                    samples.append(sample.tokens.tolist() + routes)
    return samples, seen


@pytest.mark.parametrize("max_running", [5, 18])
def test_captured_decoding_steps_draw_the_same_samples(max_running):
    """At most 5 rows, new ones coming as others leave; and 18, which need graphs of two sizes."""
    captured, seen = on_npu(drawn_tokens, True, max_running)
    plain, nothing = on_npu(drawn_tokens, False, max_running)
    assert captured == plain and len(plain) == 45
    assert seen.count("replay") > 90 and not nothing
    # 16 rows for the first batch's cache; then for that of the two others, where 18 rows run, 32, too
    assert seen.count("__enter__") == (2 if max_running == 5 else 3)


def test_captured_decoding_steps_record_the_experts_of_their_tokens():
    captured, seen = on_npu(drawn_tokens, True, 5, MIXTURE, 12, (2,))
    plain, _ = on_npu(drawn_tokens, False, 5, MIXTURE, 12, (2,))
    assert captured == plain and len(plain) == 6
    assert seen.count("replay") > 10
    assert all(len(sample) % 3 == 1 for sample in plain), (
        "n tokens and two experts of all but the last"
    )


def test_lengths_are_handed_over_when_the_replay_before_is_done():
    _, seen = on_npu(drawn_tokens, True, 5)
    steps = [name for name in seen if name != "__enter__"]
    assert steps == ["synchronize", "update", "replay", "record"] * steps.count("replay")


def step_of(rows: int, pool: BlockPool, heads: int) -> tuple[torch.Tensor, DecodeStep]:
    blocks = [SampleBlocks(number, [], pool.take_own(1)) for number in range(rows)]
    layout = DecodeLayout(blocks, pool, 1, heads, torch.device("npu"))
    return (torch.arange(rows) % 100).to("npu"), DecodeStep(layout, np.arange(rows) % BLOCK)


def step_by_graph(rows: int) -> tuple[float, int, int, int]:
    """One step in a cache full of ones: largest difference to a plain step, places of the cache
    that changed, of those that blocks have, and how many graphs were made."""
    decoder = decoder_on_npu(graphs=True)
    pool = BlockPool(
        decoder.shape, 2, torch.bfloat16, decoder.device, BLOCK, True, spare=decoder.padding
    )
    pool.reserve(rows + 4)
    tokens, step = step_of(rows, pool, decoder.heads)
    pool.keys.fill_(1)
    pool.values.fill_(1)
    with torch.inference_mode():
        plain = decoder._decode(tokens, step).hidden
        with calls() as seen:
            found = decoder._step(tokens, step).hidden
    changed = (pool.keys != 1).any(-1).any(2).any(0).cpu()  # [blocks, block]
    return (
        float((found - plain).abs().max()),
        int(changed.sum()),
        int(changed[: pool.num_blocks].sum()),
        seen.count("__enter__"),
    )


@pytest.mark.parametrize(("rows", "size"), [(1, 16), (16, 16), (17, 32), (257, 512)])
def test_rows_that_pad_change_neither_results_nor_blocks(rows, size):
    """Each of them writes one token, to a place of its own behind the blocks."""
    difference, written, in_blocks, graphs = on_npu(step_by_graph, rows)
    assert difference < 2e-2
    assert in_blocks == rows
    assert written == size
    assert graphs == 1


def test_more_rows_than_the_largest_graph_has_run_without():
    difference, written, in_blocks, graphs = on_npu(step_by_graph, SIZES[-1] + 1)
    assert difference == 0 and written == in_blocks == SIZES[-1] + 1 and graphs == 0


def graphs_of_caches(blocks: list[int]) -> list[tuple[set, int]]:
    """Pools of memory and number of the graphs for two sizes of steps, in each of these caches."""
    found = []
    decode = DecodeGraphs(lambda tokens, step: PassOutput(tokens + step.positions, None), 32)
    for count in blocks:
        pool = BlockPool(
            small_shape(), 2, torch.bfloat16, torch.device("npu"), BLOCK, True, spare=256
        )
        pool.reserve(count)
        for rows in (3, 20):
            decode(*step_of(rows, pool, 4))
        graphs = list(decode._graphs._graphs.values())
        found.append(({graph.pool() for graph in graphs}, len(graphs)))
    return found


def test_graphs_share_memory_and_a_cache_that_moves_is_captured_anew():
    """An allocator may give the same address again; the layers behind the first one lie elsewhere
    all the same."""
    first, grown = on_npu(graphs_of_caches, [24, 40])
    assert first[1] == grown[1] == 2
    assert len(first[0]) == len(grown[0]) == 1, "one pool of memory for all graphs"
    assert not first[0] & grown[0], "graphs of the cache before are gone, and their memory"


def graphs_are_on(device: str, graphs: bool | None) -> bool:
    config = EngineConfig(
        name="native",
        max_length=64,
        max_response=16,
        max_cache_tokens=512,
        max_running=None,
        graphs=graphs,
    )
    span = RankGrid.of("rollout", 0, 1)
    grid = SimpleNamespace(span=span, groups={"tp": None})
    setup: Any = SimpleNamespace(
        shape=small_shape(),
        grid=grid,
        dtype=torch.bfloat16,
        device=torch.device(device),
        config=config,
        unused=(),
        end_ids=(3,),
    )
    assert set(vars(setup)) <= set(EngineSetup.__dataclass_fields__)
    return isinstance(NativeEngine.build(setup).decoder._step, DecodeGraphs)


def test_graphs_are_on_by_default_where_there_are_npus():
    assert on_npu(graphs_are_on, "npu", None)
    assert not on_npu(graphs_are_on, "npu", False)
    assert not graphs_are_on("cpu", None)
