#!/usr/bin/env python3
"""Measure how samples travel in one step: bytes through each rank, and seconds. Prints one JSON line.

    python tools/bench_control_plane.py
    python tools/bench_control_plane.py --tokens 2048 --train 4 --rollout 4 --ref 2

Real ranks, a process each on this machine, move synthetic samples by the calls of a step: from the
rollout replicas to the ref replicas, which add log-probs, and on to the train replicas that would
learn from them. Nothing is generated, computed or learnt. Responses have from half to one and a
half times --tokens. Rank 0 is the controller and the first train rank.

Bytes are counted where messages are handed to gloo, plans and tables too. What a rank broadcasts
counts once, however many copies gloo sends of it. Memory: about 45 bytes a token in all.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path[0] = str(Path(__file__).resolve().parents[1])

from r1zero.distributed.device import prepare

DEVICE = prepare("cpu", 0)  # before anything imports Megatron

from r1zero.distributed import collectives
from r1zero.distributed.groups import World
from r1zero.distributed.launch import Launch
from r1zero.distributed.placement import RoleSize, place
from r1zero.distributed.transfer import RoleTransfer
from r1zero.policy.handover import Giver, Taker
from r1zero.types import ANY_LENGTH, Batch, Group, Part, Prompt, Sample

PROMPT_TOKENS = 200
TIMEOUT = timedelta(minutes=30)


@dataclass(slots=True)
class Bytes:
    """What went through a rank."""

    received: int = 0
    sent: int = 0
    broadcast: int = 0  # given to a group, one copy

    def install(self) -> None:
        """Count all messages of this process from now on."""
        isend = collectives.isend
        recv = collectives.recv
        broadcast_bytes = collectives.broadcast_bytes

        def counted_isend(tensor: torch.Tensor, *where: Any, **how: Any) -> dist.Work:
            self.sent += tensor.nbytes
            return isend(tensor, *where, **how)

        def counted_recv(tensor: torch.Tensor, *where: Any, **how: Any) -> torch.Tensor:
            self.received += tensor.nbytes
            return recv(tensor, *where, **how)

        def counted_broadcast(
            payload: torch.Tensor | None, source: int, group: dist.ProcessGroup
        ) -> torch.Tensor:
            told = broadcast_bytes(payload, source, group)
            if dist.get_world_size(group) == 1:
                return told
            if payload is None:
                self.received += told.nbytes
            else:
                self.broadcast += told.nbytes
            return told

        collectives.isend = counted_isend
        collectives.recv = counted_recv
        collectives.broadcast_bytes = counted_broadcast


def main() -> int:
    """Read the command line, measure, print; returns the exit code."""
    args = parse()
    sizes = {"train": args.train, "rollout": args.rollout, "ref": args.ref}
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(sum(sizes.values()), Path(folder) / "store", args)
    counts = [rank["bytes"] for rank in found]
    train = counts[: args.train]
    tokens = sum(rank["tokens"] for rank in found)
    result = {
        "ranks": sizes,
        "prompts": args.prompts,
        "samples": args.prompts * args.group,
        "tokens": tokens,
        "parts": args.parts,
        "bytes_rank_0": counts[0],
        "bytes_mean_of_train_ranks": {
            name: round(sum(count[name] for count in train) / len(train)) for name in train[0]
        },
        "bytes_received_most": max(count["received"] for count in counts),
        "bytes_sent_most": max(count["sent"] + count["broadcast"] for count in counts),
        "seconds": round(max(rank["seconds"] for rank in found), 2),
        "load_before": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(result))
    return 0


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--group", type=int, default=16, help="samples of a prompt")
    parser.add_argument("--tokens", type=int, default=8192, help="of a response, on average")
    parser.add_argument("--parts", type=int, default=8, help="in which the batch travels")
    for role, ranks in (("train", 8), ("rollout", 4), ("ref", 2)):
        parser.add_argument(f"--{role}", type=int, default=ranks, help="ranks, a replica each")
    return parser.parse_args()


def run_ranks(size: int, store: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run `measure` on every rank, each a fork of this process; what they found, in rank order."""
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    processes = [
        fork.Process(target=measure, args=(rank, size, store, args, queue)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(size)]


def measure(rank: int, size: int, store: Path, args: argparse.Namespace, queue: Any) -> None:
    """Move the samples of a step; tell bytes and seconds of this rank."""
    placement = place(
        {
            "train": RoleSize(args.train),
            "rollout": RoleSize(args.rollout),
            "ref": RoleSize(args.ref),
        },
        colocate=False,
    )
    launch = Launch("single", rank, size, 0, (0,) * size, "", 0)
    world = World(launch, placement, DEVICE, TIMEOUT, dist.FileStore(str(store), size))
    batch = plan(args)
    groups = synthetic_groups(world, batch, args)
    count = Bytes()
    count.install()
    world.barrier()
    began = time.perf_counter()
    exchange(world, batch, groups)
    seconds = time.perf_counter() - began
    tokens = sum(len(sample.tokens) for group in groups for sample in group.samples)
    told = {"received": count.received, "sent": count.sent, "broadcast": count.broadcast}
    queue.put((rank, {"bytes": told, "seconds": seconds, "tokens": tokens}))
    world.leave()


def plan(args: argparse.Namespace) -> Batch:
    """The batch that the controller draws, in parts of as many prompts each."""
    token_ids = np.arange(PROMPT_TOKENS, dtype=np.int32)
    prompts = [
        Prompt(index, "x" * 4 * PROMPT_TOKENS, token_ids, "42") for index in range(args.prompts)
    ]
    edges = [args.prompts * part // args.parts for part in range(args.parts + 1)]
    parts = tuple(Part(range(first, last), range(ANY_LENGTH)) for first, last in pairwise(edges))
    samples = args.prompts * args.group
    return Batch(1, 0, prompts, args.group, samples // args.parts, planned_parts=parts)


def synthetic_groups(world: World, batch: Batch, args: argparse.Namespace) -> list[Group]:
    """The scored groups of this rollout rank; none elsewhere."""
    random = np.random.default_rng(world.rank)
    groups = []
    for position in world.rollout.share(len(batch.prompts)):
        samples = []
        for length in random.integers(args.tokens // 2, args.tokens * 3 // 2 + 1, args.group):
            tokens = random.integers(0, 150_000, length, dtype=np.int32)
            logprobs = -random.random(length, dtype=np.float32)
            samples.append(Sample(tokens, logprobs, False, 0, reward=float(random.random())))
        groups.append(Group(position, batch.prompts[position], samples))
    return groups


def exchange(world: World, drawn: Batch, groups: list[Group]) -> None:
    """Every move of samples of a step."""
    move = RoleTransfer(world)
    batch = move.share_batch(drawn if world.is_controller else None)
    giver = Giver(move, batch, world.giver, world.train)
    for part in batch.parts:
        mine = [group for group in groups if group.position in part.positions]
        arrived = move.send_to_replicas(batch, mine, part.positions, world.rollout, world.giver)
        for group in arrived:
            for sample in group.samples:
                sample.ref_logprobs = sample.logprobs
        giver.give(arrived)
    taker = Taker(move, batch, world.giver, world.train, world.rollout)
    learnt_from = []
    for _ in batch.parts:
        learnt_from += taker.take()
    move.flush(batch.step)


if __name__ == "__main__":
    sys.exit(main())
