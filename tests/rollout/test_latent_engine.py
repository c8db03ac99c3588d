"""The engine with latent attention: against transformers, in the latent space and expanded, on one rank
and on two."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.models import make_model
from support.multiproc import run_ranks
from support.worlds import make_world

from r1zero.models.config import ModelConfig
from r1zero.models.params import ShardIndex, Shards, param_table
from r1zero.rollout.block_attention import DecodeLayout, DecodeStep
from r1zero.rollout.decoder import Chunk, Decoder
from r1zero.rollout.engine import EngineLimits, NativeEngine
from r1zero.rollout.interface import Sampling
from r1zero.rollout.kv_cache import BlockPool, SampleBlocks
from r1zero.rollout.operators import Operators
from r1zero.types import Batch, Prompt
from r1zero.weights.open import open_weights

EXACT = 1e-5  # of log-probs in fp32
AMPLE = EngineLimits(24, 10**6)
SCARCE = EngineLimits(24, 60, None, 7, 4)  # a tenth of the tokens, prompts in pieces of 7
SAMPLING = Sampling(0.7, 1.0, 0, seed=5)
CPU = torch.device("cpu")
# with YaRN and groups of experts; and without a rank of queries
MODELS = ["deepseek_v3", "moonlight"]


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """A model of four layers, the first of them dense, and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return make_model(request.param, folder), str(folder)


def decoder_of(folder, dtype=torch.float32, device=CPU, grid=None):
    """A decoder with the model's weights, alone or on a rank of `grid`."""
    shape = ModelConfig.from_folder(folder)
    ranks = grid.span.tp if grid else 1
    rank = grid.tp_index if grid else 0
    group = grid.groups["tp"] if grid else None
    decoder = Decoder(shape, ranks, group, dtype, device, 128)
    index = ShardIndex(tp=rank, ep=rank)
    shards = Shards(tp=ranks, ep=ranks)
    weights = open_weights(folder, shape)
    for tensor, part in weights.stream(param_table(shape), index, shards, dtype):
        decoder.weights[tensor.name].copy_(part)
    return decoder


def engine_on(folder, limits=AMPLE, grid=None):
    """An engine with the model's weights in fp32."""
    engine = NativeEngine(decoder_of(folder, grid=grid), (2, 9, 40), limits)
    engine.weights().commit(4)
    return engine


def generate(engine):
    """All groups of a batch of five prompts."""
    random = np.random.default_rng(0)
    prompts = []
    for number, length in enumerate([4, 11, 1, 30, 8]):
        prompts.append(Prompt(number, "", random.integers(3, 512, length, dtype=np.int32), ""))
    batch = Batch(2, 4, prompts, 3, 15, keeps_routes=True)
    engine.submit(batch, range(5), SAMPLING)
    return engine.collect(batch.everything)


def assert_equal(found, expected):
    """The same samples, through the same experts."""
    for one, other in zip(found, expected, strict=True):
        for sample, its in zip(one.samples, other.samples, strict=True):
            np.testing.assert_array_equal(sample.tokens, its.tokens)
            np.testing.assert_array_equal(sample.routes, its.routes)
            np.testing.assert_allclose(sample.logprobs, its.logprobs, rtol=0, atol=EXACT)


@pytest.mark.parametrize("native", [True, False], ids=["kernels", "PyTorch"])
def test_log_probs_are_those_of_transformers(model, native):
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
                logits = reference(ids[None]).logits[0, prompt - 1 : -1].float()
            logprobs = (logits / SAMPLING.temperature).log_softmax(-1)
            expected = logprobs.gather(1, ids[prompt:, None])[:, 0]
            np.testing.assert_allclose(sample.logprobs, expected, rtol=0, atol=EXACT)


def decoded_and_expanded(decoder, tokens):
    """Logits behind the last of these tokens: by a decoding step, and by a chunk, whose keys and values
    are expanded."""
    [before] = decoder.extend([Chunk(tokens[:-1])])
    [whole] = decoder.extend([Chunk(tokens[-1:], before.new)])
    pool = BlockPool(decoder.shape, decoder.kv_heads, decoder.dtype, decoder.device, 16)
    pool.reserve(4)
    blocks = pool.take_own(-(-len(tokens) // 16))
    pool.write(blocks, before.new.keys, before.new.values)
    layout = DecodeLayout([SampleBlocks(0, [], blocks)], pool, 1, decoder.heads, decoder.device)
    decoded = decoder.decode(tokens[-1:], DecodeStep(layout, np.array([len(tokens) - 1])))
    return decoded.logits[0].clone(), whole.logits


def test_decoding_in_the_latent_space_equals_expanded_keys_and_values(model):
    decoder = decoder_of(model[1])
    decoder.prepare()
    tokens = np.random.default_rng(1).integers(3, 512, 41)
    decoded, expanded = decoded_and_expanded(decoder, tokens)
    torch.testing.assert_close(decoded, expanded, rtol=0, atol=EXACT)


def test_samples_that_make_way_and_prompts_in_pieces_are_the_same(model):
    expected = generate(engine_on(model[1]))
    engine = engine_on(model[1], SCARCE)
    assert_equal(generate(engine), expected)
    assert engine.preemptions > 0


def two_ranks_body(rank, size, store, folder):
    """Groups of two TP ranks."""
    grid = make_world(rank, size, store, (1, 1), rollout=2).rollout
    engine = engine_on(folder, grid=grid)
    up = engine.decoder.weights["decoder.layers.0.self_attention.linear_kv_up_proj.weight"]
    return generate(engine), up.shape


def test_two_ranks_draw_the_same(model):
    expected = generate(engine_on(model[1]))
    for groups, up in run_ranks(two_ranks_body, 2, model[1]):
        assert_equal(groups, expected)
        assert up == (2 * (24 + 20), 32), "two of four heads"


def test_bytes_of_a_token_in_the_cache(model):
    """A latent of 32 columns and a key of 16, of each of four layers."""
    decoder = decoder_of(model[1], torch.bfloat16)
    pool = BlockPool(decoder.shape, decoder.kv_heads, decoder.dtype, decoder.device, 16)
    pool.reserve(8)
    held = pool.keys.untyped_storage().nbytes() + pool.values.untyped_storage().nbytes()
    assert held == (32 + 16) * 2 * 4 * 8 * 16


def test_the_bias_of_experts_stays_in_fp32(model):
    decoder = decoder_of(model[1], torch.bfloat16)
    bias = decoder.weights["decoder.layers.1.mlp.router.expert_bias"]
    held = model[0].state_dict()["model.layers.1.mlp.gate.e_score_correction_bias"]
    torch.testing.assert_close(bias, held, rtol=0, atol=0)
