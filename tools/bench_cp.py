"""Measure context parallelism: memory, work and loss of one long sequence on several CPU ranks.

    python tools/bench_cp.py --cp 1
    python tools/bench_cp.py --cp 4 --response 7936 --recompute

A small Qwen2 with random weights reads a prompt and one response, and takes one backward pass.
Prints one JSON line: tokens of a rank (filled up ones included), pairs of a query and a key on the
busiest rank over the mean of all, the loss, the largest growth of resident memory on a rank during
the pass, and its seconds, the slowest rank's. The loss is the same for every --cp within rounding.
Exit code 1 if a rank failed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from r1zero.distributed.device import prepare

DEVICE = prepare("cpu", 0)  # before anything imports Megatron

import numpy as np
import torch
import torch.distributed as dist

from r1zero.algo.packing import Microbatch, TrainSample, pack
from r1zero.algo.zigzag import deal
from r1zero.distributed.groups import World
from r1zero.distributed.launch import Launch
from r1zero.distributed.placement import RoleSize, place
from r1zero.models.config import ModelConfig
from r1zero.policy.megatron import RoleModel
from r1zero.policy.pipeline import logprob_step, run_pipeline
from r1zero.types import Prompt, Sample

LIMIT = timedelta(minutes=30)
# Keys and values are as small beside the hidden size as those of a 7B model.
SHAPE = ModelConfig(
    family="qwen2",
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=1024,
    num_heads=8,
    num_kv_heads=1,
    head_dim=32,
    vocab_size=512,
    max_positions=2**20,
    rope_theta=1e6,
    rope_scaling=None,
    norm_eps=1e-6,
    tie_word_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
)


@dataclass(frozen=True)
class Measured:
    """What a rank saw."""

    tokens: int
    pairs: int
    loss: float
    bytes: int
    seconds: float


def main() -> int:
    args = parse()
    context = multiprocessing.get_context("fork")
    queue: SimpleQueue[tuple] = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(args.cp):
            ranks.append(context.Process(target=run_rank, args=(rank, args, folder, queue)))
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        return 1
    found = [Measured(*queue.get()) for _ in ranks]
    pairs = [each.pairs for each in found]
    told = {
        "cp": args.cp,
        "tokens": args.prompt + args.response - 1,
        "tokens of a rank": found[0].tokens,
        "busiest rank over mean": round(max(pairs) / np.mean(pairs), 4),
        "loss": round(found[0].loss, 6),
        "peak megabytes": round(max(each.bytes for each in found) / 1e6),
        "seconds": round(max(each.seconds for each in found), 1),
    }
    print(json.dumps(told), flush=True)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cp", type=int, default=2, help="ranks that share the sequence")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--response", type=int, default=7937, help="tokens")
    parser.add_argument("--recompute", action="store_true", help="layers, in the backward pass")
    return parser.parse_args()


def run_rank(rank: int, args: argparse.Namespace, folder: str, queue: SimpleQueue) -> None:
    """Be one of the ranks."""
    torch.set_num_threads(1)
    sys.stdout.flush()
    size = args.cp
    sizes = {"train": RoleSize(size, cp=size), "rollout": RoleSize(size)}
    launch = Launch("single", rank, size, 0, (0,) * size, "", 0)
    store = dist.FileStore(f"{folder}/store", size)
    world = World(launch, place(sizes, colocate=True), DEVICE, LIMIT, store)
    model = RoleModel(
        SHAPE,
        world.train,
        DEVICE,
        torch.float32,
        args.prompt + args.response,
        sequence_parallel=False,
        recompute=args.recompute,
        seed=1,
    )
    fill_at_random(model)
    learn(model, sample_of(8, 8))  # what is allocated once shall be there
    sample = sample_of(args.prompt, args.response)
    world.barrier()
    before = start_watching_memory()
    began = time.monotonic()
    loss, tokens = learn(model, sample)
    seconds = time.monotonic() - began
    grown = peak_memory() - before
    dealt = deal(pack([sample], torch.device("cpu")).segments, size)
    pairs = sum(piece.pairs for piece in dealt[rank])
    queue.put((tokens, pairs, loss, grown, seconds))
    world.barrier()
    world.leave()
    os._exit(0)


@torch.no_grad()
def fill_at_random(model: RoleModel) -> None:
    """The same weights on every rank: no axis here cuts them."""
    torch.manual_seed(1)
    for name, parameter in model.parameters().items():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0, 0.05)


def sample_of(prompt: int, response: int) -> TrainSample:
    """One of so many tokens."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, SHAPE.vocab_size, prompt + response, dtype=np.int32)
    drawn = Sample(tokens[prompt:], np.zeros(response, np.float32), False, 0)
    return TrainSample(0, 0, Prompt(0, "", tokens[:prompt], ""), drawn)


def learn(model: RoleModel, sample: TrainSample) -> tuple[float, int]:
    """One forward and backward pass; returns the loss and how many tokens this rank computed."""

    def loss(
        batch: Microbatch, logprobs: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[float, int]]:
        value = -logprobs.mean()
        return value, (value.item(), len(batch.tokens))

    last_step = logprob_step(model, 1.0, loss)
    [found] = run_pipeline(model, model.module, [[sample]], last_step, backward=True)
    return found


def start_watching_memory() -> int:
    """Resident bytes of this process now, from which on its peak is counted. What was freed is
    given back first: else it would be filled again unseen."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    return peak_memory()


def peak_memory() -> int:
    """Most resident bytes of this process so far."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None, "Linux tells the peak of a process"
    return int(found[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
