"""Measure latent attention of one decoding step: in the latent space, and with keys and values expanded.

    python tools/bench_latent_decode.py
    python tools/bench_latent_decode.py --heads 128 --tokens 4096

One layer with the sizes of DeepSeek-V3 and random weights in fp32 attends with each row's new token to
all its tokens. Prints one JSON line: seconds of each way, and bytes that the cache has of a token.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from r1zero.models.config import Latent, ModelConfig
from r1zero.models.rotary import rotary_tables
from r1zero.ops.attention import Segments, packed_causal_attention
from r1zero.rollout.block_attention import DecodeLayout, DecodeStep
from r1zero.rollout.kv_cache import BlockPool, SampleBlocks
from r1zero.rollout.latent import expand
from r1zero.rollout.linear import Linear
from r1zero.rollout.native import operators
from r1zero.rollout.operators import Heads, Operators

CPU = torch.device("cpu")
LATENT = Latent(query_latent=1536, rank=512, nope_dim=128, rope_dim=64, value_dim=128)
SHAPE = ModelConfig(
    family="deepseek_v3",
    num_layers=1,
    hidden_size=2048,
    ffn_hidden_size=2048,
    num_heads=16,
    num_kv_heads=16,
    head_dim=LATENT.query_dim,
    vocab_size=512,
    max_positions=2**15,
    rope_theta=1e4,
    rope_scaling=None,
    norm_eps=1e-6,
    tie_word_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
    latent=LATENT,
)
WARM_UP = 1


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024, help="of each row")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = replace(SHAPE, num_heads=args.heads, num_kv_heads=args.heads)
    cos, sin = rotary_tables(shape, args.tokens, CPU)
    scale = shape.attention_scale
    made = operators(Heads(1, args.heads, shape.head_dim, shape.norm_eps, scale, cos, sin, LATENT))
    step = _full_step(shape, args.rows, args.tokens)
    query = torch.randn(args.rows, args.heads * LATENT.query_dim)
    latent = torch.randn(args.rows, LATENT.rank)
    key = torch.randn(args.rows, LATENT.rope_dim)
    up = Linear(torch.randn(args.heads * 256, LATENT.rank) * LATENT.rank**-0.5)
    up.prepare()
    pool = step.layout.pool
    result = {
        "rows": args.rows,
        "tokens": args.tokens,
        "heads": args.heads,
        "latent_s": _seconds(
            args.repeats, lambda: made.decoding_latent(step)(0, query, latent, key, up)
        ),
        "expanded_s": _seconds(args.repeats, lambda: _expanded(made, step, query, latent, key, up)),
        "cached_bytes": (pool.keys.shape[-1] + pool.values.shape[-1]) * pool.keys.element_size(),
        "expanded_bytes": args.heads * (LATENT.query_dim + LATENT.value_dim) * 4,
    }
    print(json.dumps(result))
    return 0


def _full_step(shape: ModelConfig, rows: int, tokens: int) -> DecodeStep:
    """Rows of so many tokens each, the new one included, in a cache of random content."""
    pool = BlockPool(shape, 1, torch.float32, CPU)
    blocks = -(-tokens // pool.block)
    pool.reserve(rows * blocks)
    pool.keys.normal_()
    pool.values.normal_()
    samples = [SampleBlocks(row, [], pool.take_own(blocks)) for row in range(rows)]
    layout = DecodeLayout(samples, pool, 1, shape.num_heads, CPU)
    return DecodeStep(layout, np.full(rows, tokens - 1))


def _expanded(
    made: Operators,
    step: DecodeStep,
    query: torch.Tensor,
    latent: torch.Tensor,
    key: torch.Tensor,
    up: Linear,
) -> torch.Tensor:
    """The same step by keys and values of all heads, made of what is cached."""
    tokens = made.turn_latent(query, latent, key, made.latent_rotary(step.positions))
    keys = []
    values = []
    for row, length in zip(step.layout.rows, step.lengths, strict=True):
        cached_keys, cached = step.layout.pool.read(row.own)
        of_heads = expand(cached[0, 0, :length, None], cached_keys[0, 0, :length, None], up, LATENT)
        keys.append(of_heads[0])
        values.append(of_heads[1])
    segments = Segments(list(range(1, len(query) + 1)), np.cumsum(step.lengths).tolist())
    whole = tokens.whole_query()
    return packed_causal_attention(
        whole, torch.cat(keys), torch.cat(values), segments, made.heads.scale
    )


def _seconds(repeats: int, run: Callable[[], object]) -> float:
    """Of one run, the mean of some."""
    for _ in range(WARM_UP):
        run()
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return round((time.perf_counter() - begin) / repeats, 5)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
