"""Decoding by the fused operators of NPUs, on the stand-in: equal to PyTorch's operators, in eleven
launches a layer, with latent attention in 21."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.launches import Launches
from support.npu_process import on_npu
from support.shapes import small_shape

from r1zero.models.config import Latent, ModelConfig
from r1zero.rollout.block_attention import DecodeLayout, DecodeStep
from r1zero.rollout.decoder import Chunk, Decoder
from r1zero.rollout.kv_cache import BlockPool, SampleBlocks
from r1zero.rollout.native import operators
from r1zero.rollout.npu_operators import NpuOperators
from r1zero.rollout.operators import Heads, Operators

BLOCK = 16
LENGTHS = [5, 1, 31, 16, 47]  # tokens of each row, the new one included
# bf16, where the fused operators round less often than PyTorch's: some roundings.
BF16 = 5e-2


def heads_on(device: str, kv_heads: int, per_group: int, dim: int) -> Heads:
    angles = torch.arange(64)[:, None] / 10 ** torch.linspace(0, 2, dim // 2)
    tables = [torch.cat([f(angles)] * 2, dim=-1).bfloat16() for f in (torch.cos, torch.sin)]
    return Heads(kv_heads, per_group, dim, 1e-6, dim**-0.5, *(table.to(device) for table in tables))


def attended(made: Operators, normed: bool) -> list[torch.Tensor]:
    """One layer's attention of five samples, two of one prompt: output and the whole cache."""
    torch.manual_seed(1)
    at = made.heads
    device = at.cos.device
    num_heads = at.kv_heads * at.per_group
    shape = small_shape(
        num_layers=1, num_heads=num_heads, num_kv_heads=at.kv_heads, head_dim=at.dim
    )
    pool = BlockPool(shape, at.kv_heads, torch.bfloat16, device, BLOCK, made.token_major)
    pool.reserve(20)
    before = torch.randn(2, len(LENGTHS), 1, at.kv_heads, 64, at.dim).bfloat16()
    before[:, 4, ..., :16, :] = before[:, 2, ..., :16, :]
    prompt = pool.take_shared(1)
    rows = []
    for row, length in enumerate(LENGTHS):
        shared = prompt if row in (2, 4) else []
        own = pool.take_own(-(-length // BLOCK) - len(shared))
        keys, values = before[:, row, :, :, : length - 1].to(device)
        pool.write((shared + own)[: -(-(length - 1) // BLOCK)], keys, values)
        rows.append(SampleBlocks(2 if row == 4 else row, shared, own))
    layout = DecodeLayout(rows, pool, 2, num_heads, device)
    step = DecodeStep(layout, np.array(LENGTHS) - 1)
    qkv = torch.randn(len(LENGTHS), (num_heads + 2 * at.kv_heads) * at.dim).bfloat16().to(device)
    norms = [None, None]
    if normed:
        norms = list((torch.rand(2, at.dim) + 0.5).bfloat16().to(device))
    found = made.decoding(step)(0, qkv, *norms)
    return [x.float().cpu() for x in (found, pool.keys, pool.values)]


def attention_difference(kv_heads: int, per_group: int, dim: int, normed: bool) -> list[float]:
    fused = operators(heads_on("npu", kv_heads, per_group, dim))
    assert type(fused) is NpuOperators
    found = attended(fused, normed)
    expected = attended(Operators(heads_on("cpu", kv_heads, per_group, dim)), normed)
    return [float((x - y).abs().max()) for x, y in zip(found, expected, strict=True)]


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "q/k norms"])
@pytest.mark.parametrize(("kv_heads", "per_group", "dim"), [(2, 2, 16), (2, 7, 64), (1, 3, 128)])
def test_attention_and_what_it_writes_equal_pytorchs(kv_heads, per_group, dim, normed):
    output, keys, values = on_npu(attention_difference, kv_heads, per_group, dim, normed)
    assert output < BF16 and keys < BF16
    assert values == 0, "RoPE leaves values as they are"


def decoder_on(device: str, shape: ModelConfig) -> Decoder:
    decoder = Decoder(shape, 1, None, torch.bfloat16, torch.device(device), 64)
    torch.manual_seed(5)
    for weight in decoder.weights.values():
        weight.copy_(torch.randn(weight.shape) * 0.2)
    decoder.prepare()
    return decoder


def prefilled(decoder: Decoder) -> list[torch.Tensor]:
    """A prompt in one piece, another one that goes on after its first piece."""
    whole = np.arange(3, 20)
    [begun] = decoder.extend([Chunk(whole[:9])])
    first, second = decoder.extend([Chunk(whole[::-1].copy()), Chunk(whole[9:], begun.new)])
    return [x.float().cpu() for x in (first.logits, second.logits, second.new.keys)]


def prefill_difference(shape: ModelConfig) -> list[float]:
    found = prefilled(decoder_on("npu", shape))
    expected = prefilled(decoder_on("cpu", shape))
    return [
        float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, expected, strict=True)
    ]


FAMILIES = {
    "qwen2": {},
    "qwen3": {"family": "qwen3", "qk_norm": True, "qkv_bias": False},
    "olmo2": {"family": "olmo2", "qk_norm": True, "qkv_bias": False},
    "deepseek_v3": {
        "family": "deepseek_v3",
        "num_kv_heads": 4,
        "head_dim": 80,
        "qkv_bias": False,
        "latent": Latent(query_latent=24, rank=512, nope_dim=16, rope_dim=64, value_dim=12),
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_run_by_the_fused_operators_give_the_same_logits(family):
    assert max(on_npu(prefill_difference, small_shape(**FAMILIES[family]))) < BF16


def launches(shape: ModelConfig) -> int:
    decoder = decoder_on("npu", shape)
    device = decoder.device
    pool = BlockPool(shape, decoder.kv_heads, decoder.dtype, device, BLOCK, token_major=True)
    pool.reserve(4)
    rows = [SampleBlocks(number, [], pool.take_own(1)) for number in range(3)]
    step = DecodeStep(DecodeLayout(rows, pool, 1, decoder.heads, device), np.array([3, 4, 5]))
    with Launches() as seen:
        decoder.decode(np.array([5, 6, 7]), step)
    return seen.counted.total()


def launches_of_a_layer(family: str) -> int:
    """What a third layer adds."""
    three = small_shape(num_layers=3, **FAMILIES[family])
    return launches(three) - launches(small_shape(**FAMILIES[family]))


@pytest.mark.parametrize(
    # q/k norms are two, and laying the new keys beside their values; latent attention has four
    # products more, two norms of latents, and three copies that put columns and queries in order
    ("family", "most"),
    [("qwen2", 11), ("qwen3", 14), ("deepseek_v3", 21)],
)
def test_launches_of_a_decoding_step(family, most):
    assert on_npu(launches_of_a_layer, family) == most
    assert on_npu(launches, small_shape(**FAMILIES[family])) - 2 * most == 7, (
        "tokens to the device, embedding, slots, cos, sin; last norm and logits"
    )


def embedding_of_a_part() -> tuple[list[list[float]], int]:
    """The rows that the second of two ranks has of four tokens, before the sum; and the launches."""
    decoder = decoder_on("npu", small_shape())
    rows = torch.arange(12.0).view(6, 2) + 1  # of ids 6 to 11
    decoder.embedding = rows.to("npu")
    decoder.group = object()
    tokens = torch.tensor([5, 6, 11, 12]).to("npu")
    with (
        patch.object(dist, "get_rank", return_value=1),
        patch.object(dist, "all_reduce"),
        Launches() as seen,
    ):
        hidden = decoder._embed(tokens)
    return hidden.cpu().tolist(), seen.counted.total()


def test_a_part_of_the_vocabulary_embeds_its_tokens_alone_and_makes_no_tensor_for_others():
    hidden, launches = on_npu(embedding_of_a_part)
    assert hidden == [[0, 0], [1, 2], [11, 12], [0, 0]]
    assert launches == 7, "difference, two comparisons, both; row numbers, embedding, product"
