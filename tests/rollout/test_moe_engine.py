"""The engine with a mixture of experts: against transformers, on one rank and on two, and what it
records of the experts that tokens went to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.models import make_model
from support.multiproc import run_ranks
from support.worlds import make_world

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.params import ShardIndex, Shards, param_table
from r1zero.rollout.decoder import Decoder
from r1zero.rollout.engine import EngineLimits, NativeEngine
from r1zero.rollout.interface import Sampling
from r1zero.rollout.linear import Router
from r1zero.rollout.operators import Operators
from r1zero.types import Batch, Prompt
from r1zero.weights.open import open_weights

EXACT = 1e-5  # of log-probs in fp32
AMPLE = EngineLimits(24, 10**6)
SCARCE = EngineLimits(24, 60, None, 7, 4)  # a tenth of the tokens, prompts in pieces of 7
SAMPLING = Sampling(0.7, 1.0, 0, seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of four layers, one of them dense, and its folder."""
    folder = tmp_path_factory.mktemp("moe")
    return make_model("qwen3_moe", folder, mlp_only_layers=[1]), str(folder)


def engine_on(folder, limits=AMPLE, grid=None):
    """An engine with the model's weights in fp32, alone or on a rank of `grid`."""
    shape = ModelConfig.from_folder(folder)
    ranks = grid.span.tp if grid else 1
    rank = grid.tp_index if grid else 0
    group = grid.groups["tp"] if grid else None
    decoder = Decoder(shape, ranks, group, torch.float32, torch.device("cpu"), 128)
    index = ShardIndex(tp=rank, ep=rank)
    shards = Shards(tp=ranks, ep=ranks)
    weights = open_weights(folder, shape)
    for tensor, part in weights.stream(param_table(shape), index, shards, torch.float32):
        decoder.weights[tensor.name].copy_(part)
    engine = NativeEngine(decoder, (2, 9, 40), limits)
    engine.weights().commit(4)
    return engine


def routers_of(engine):
    """Those of all layers."""
    return [product for product in engine.decoder._products if isinstance(product, Router)]


def batch(keeps_routes=True):
    random = np.random.default_rng(0)
    prompts = []
    for number, length in enumerate([4, 11, 1, 30, 8]):
        prompts.append(Prompt(number, "", random.integers(3, 512, length, dtype=np.int32), ""))
    return Batch(2, 4, prompts, 3, 15, keeps_routes=keeps_routes)


def generate(engine, keeps_routes=True):
    """All groups of the batch."""
    asked = batch(keeps_routes)
    engine.submit(asked, range(5), SAMPLING)
    return engine.collect(asked.everything)


def assert_equal(found, expected, tolerance=EXACT):
    """The same samples, through the same experts."""
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.prompt_routes, other.prompt_routes)
        for sample, its in zip(one.samples, other.samples, strict=True):
            np.testing.assert_array_equal(sample.tokens, its.tokens)
            np.testing.assert_array_equal(sample.routes, its.routes)
            np.testing.assert_allclose(sample.logprobs, its.logprobs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("native", [True, False], ids=["kernels", "PyTorch"])
def test_log_probs_and_recorded_experts_are_those_of_transformers(model, native):
    reference, folder = model
    engine = engine_on(folder)
    if not native:
        engine.decoder.operators = Operators(engine.decoder.operators.heads)
    for group in generate(engine):
        prompt = len(group.prompt.tokens)
        for sample in group.samples:
            tokens = np.concatenate([group.prompt.tokens, sample.tokens])
            ids = torch.from_numpy(tokens.astype(np.int64))
            with torch.no_grad():
                output = reference(ids[None], output_router_logits=True)
            logits = output.logits[0, prompt - 1 : -1].float() / SAMPLING.temperature
            logprobs = logits.log_softmax(-1).gather(1, ids[prompt:, None])[:, 0]
            np.testing.assert_allclose(sample.logprobs, logprobs, rtol=0, atol=EXACT)
            # [T, MoE layers, k]; the last token went nowhere yet
            scores = torch.stack(output.router_logits, dim=1)[:-1]
            chosen = scores.topk(3).indices.sort(-1).values
            recorded = np.concatenate([group.prompt_routes, sample.routes])
            assert recorded.dtype == np.uint8 and recorded.shape == (len(tokens) - 1, 3, 3)
            np.testing.assert_array_equal(np.sort(recorded, -1), chosen)


def test_samples_that_make_way_and_prompts_in_pieces_record_the_same(model):
    _, folder = model
    expected = generate(engine_on(folder))
    engine = engine_on(folder, SCARCE)
    assert_equal(generate(engine), expected)
    assert engine.preemptions > 0


def test_what_runs_once_more_goes_to_its_recorded_experts(model):
    """However its router would choose by then."""
    _, folder = model
    engine = engine_on(folder, SCARCE)
    extend = engine.decoder.extend
    forced = []

    def extend_with_other_routers(chunks):
        for router in routers_of(engine):
            router._wide.normal_()
        extended = extend(chunks)
        for chunk, found in zip(chunks, extended, strict=True):
            if chunk.routes is not None:
                np.testing.assert_array_equal(found.routes.numpy(), chunk.routes)
                forced.append(chunk)
        return extended

    engine.decoder.extend = extend_with_other_routers
    generate(engine)
    assert len(forced) >= engine.preemptions > 0
    assert any(chunk.before is None for chunk in forced), "a prompt was run once more, too"


def test_evaluation_records_nothing(model):
    _, folder = model
    for limits in (AMPLE, SCARCE):
        engine = engine_on(folder, limits)
        kept = generate(engine)
        plain = generate(engine, keeps_routes=False)
        for group, its in zip(plain, kept, strict=True):
            assert group.prompt_routes is None
            for sample, other in zip(group.samples, its.samples, strict=True):
                assert sample.routes is None
                np.testing.assert_array_equal(sample.tokens, other.tokens)


def two_ranks_body(rank, size, store, folder):
    """Groups of two TP ranks, with ample and with scarce memory; and what is said if a sum left
    other bits on one of them, of prompts or of decoding steps."""
    grid = make_world(rank, size, store, (1, 1), rollout=2).rollout
    engine = engine_on(folder, grid=grid)
    held = {name: tensor.shape for name, tensor in engine.decoder.weights.items()}
    found = [generate(engine), generate(engine_on(folder, SCARCE, grid))]
    engine.weights().commit(5)
    extend = engine.decoder.extend

    def extend_before_it_differs(chunks):
        extended = extend(chunks)
        if rank == 1:
            routers_of(engine)[0]._wide.normal_()
        return extended

    engine.decoder.extend = extend_before_it_differs
    with pytest.raises(BadInput, match="choose different experts"):
        generate(engine)
    engine = engine_on(folder, grid=grid)
    if rank == 1:
        routers_of(engine)[0].weight.mul_(-1)
    with pytest.raises(BadInput, match="choose different experts"):
        generate(engine)
    return found, held


def test_two_ranks_draw_the_same_through_the_same_experts(model):
    _, folder = model
    expected = generate(engine_on(folder))
    for found, held in run_ranks(two_ranks_body, 2, folder):
        for groups in found:
            assert_equal(groups, expected)
        assert held["decoder.layers.0.mlp.experts.linear_fc1.weight"] == (4, 96, 64)
        assert held["decoder.layers.0.mlp.experts.linear_fc2.weight"] == (4, 64, 48)
        assert held["decoder.layers.0.mlp.router.weight"] == (8, 64)


def test_a_tp_size_that_does_not_divide_the_experts_is_refused(model):
    shape = ModelConfig.from_folder(model[1])
    odd = replace(shape, num_heads=6, num_kv_heads=3, vocab_size=510, ffn_hidden_size=96)
    with pytest.raises(BadInput, match="experts"):
        Decoder(odd, 3, None, torch.float32, torch.device("cpu"), 64)
