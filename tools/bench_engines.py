#!/usr/bin/env python3
"""Measure rollout engines side by side: the same weights, prompts and lengths. Prints one JSON line.

    python tools/bench_engines.py --model 135m --engines native vllm --prompts 8 --samples 4 \\
        --prompt-len 128 --length 64 --dtype bf16 --threads 1 --repeats 3

--model is a folder with a config.json or a shape of tools/bench_rollout.py; weights are random.
Engines are those of actor_rollout.engine, on one process; they take turns, after a turn of each that
is not counted. A turn begins with what a publish ends with. `cpu_tokens_per_second` are tokens per
second of processor time, which other work on the machine moves less; `same_samples` is the share of
samples that are those of the first engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from bench_rollout import SHAPES, at_least_1

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.rollout.engines import engine_problems

if TYPE_CHECKING:
    import torch

    from r1zero.distributed.groups import World
    from r1zero.rollout.interface import RolloutEngine
    from r1zero.types import Batch, Group

TIMEOUT = timedelta(minutes=10)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="135m")
    parser.add_argument("--engines", nargs="+", default=["native", "vllm"])
    for name, default in (("prompts", 8), ("samples", 4), ("prompt-len", 128), ("length", 64)):
        parser.add_argument(f"--{name}", type=at_least_1, default=default)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--threads", type=at_least_1, default=1)
    parser.add_argument("--repeats", type=at_least_1, default=3)
    return parser.parse_args()


def main() -> int:
    """Run the benchmark."""
    args = parse()
    try:
        for name in args.engines:
            for problem in engine_problems(name, "--engines"):
                raise BadInput(problem)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(args, model_folder(args.model, Path(folder)))), flush=True)
    except BadInput as error:
        print(f"bench_engines.py: {error}", file=sys.stderr)
        return 2
    return 0


def model_folder(model: str, made: Path) -> Path:
    """The folder with the model's config.json, written to `made` for a shape."""
    if model not in SHAPES:
        return Path(model)
    family = ModelConfig.from_config(SHAPES[model]).family
    (made / "config.json").write_text(json.dumps({**SHAPES[model], "model_type": family}))
    return made


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Let the engines take turns."""
    import torch

    torch.set_num_threads(args.threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    world = world_of_one()
    engines = {name: build(name, args, folder, dtype, world) for name in args.engines}
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    drawn: dict[str, list[Group]] = {}
    batch = questions(args, ModelConfig.from_folder(folder))
    for turn in range(args.repeats + 1):
        for name, engine in engines.items():
            wall, processor, drawn[name] = take_turn(engine, batch, args.length)
            if turn:
                turns[name].append((wall, processor))
    result = vars(args) | {"tokens": batch.num_samples * args.length}
    first = drawn[args.engines[0]]
    for name, times in turns.items():
        wall, processor = (statistics.median(column) for column in zip(*times, strict=True))
        result[name] = {
            "tokens_per_second": round(result["tokens"] / wall, 1),
            "cpu_tokens_per_second": round(result["tokens"] / processor, 1),
            "same_samples": round(share_of_same(first, drawn[name]), 3),
        }
    return result


def world_of_one() -> World:
    """A world that is this process, with all roles."""
    import torch.distributed as dist

    from r1zero.distributed.device import prepare
    from r1zero.distributed.groups import World
    from r1zero.distributed.launch import Launch
    from r1zero.distributed.placement import RoleSize, place

    roles = {role: RoleSize(1) for role in ("train", "rollout")}
    launch = Launch("single", 0, 1, 0, (0,), "", 0)
    placement = place(roles, colocate=True)
    return World(launch, placement, prepare("cpu", 0), TIMEOUT, dist.HashStore())


def build(
    name: str, args: argparse.Namespace, folder: Path, dtype: torch.dtype, world: World
) -> RolloutEngine:
    """An engine with random weights, the same for all engines."""
    import torch

    from r1zero.models.params import WHOLE, local_shape, param_table
    from r1zero.rollout.engines import choose_engine
    from r1zero.rollout.interface import EngineConfig, EngineSetup

    longest = args.prompt_len + args.length
    shape = ModelConfig.from_folder(folder)
    config = EngineConfig(
        name=name,
        max_length=longest,
        max_response=args.length,
        max_cache_tokens=args.prompts * args.samples * longest,
        max_running=args.prompts * args.samples,
        graphs=None,
    )
    engine = choose_engine(name).build(
        EngineSetup(
            model_folder=folder,
            shape=shape,
            grid=world.rollout,
            dtype=dtype,
            device=world.device.torch,
            end_ids=(),
            unused=(),
            config=config,
        )
    )
    random = torch.Generator().manual_seed(0)
    for spec in param_table(shape):
        values = torch.randn(local_shape(spec, WHOLE), generator=random) * 0.02
        engine.weights().write(spec, (values + ("norm" in spec.name)).to(dtype), WHOLE)
    return engine


def questions(args: argparse.Namespace, shape: ModelConfig) -> Batch:
    """Random prompts of one length."""
    from r1zero.types import Batch, Prompt

    sizes = (args.prompts, args.prompt_len)
    tokens = np.random.default_rng(1).integers(10, shape.vocab_size, sizes, dtype=np.int32)
    prompts = [Prompt(number, "", row, "") for number, row in enumerate(tokens)]
    return Batch(1, 0, prompts, args.samples, args.prompts * args.samples)


def take_turn(engine: RolloutEngine, batch: Batch, length: int) -> tuple[float, float, list[Group]]:
    """Generate the batch; returns seconds, seconds of processor time, and the groups."""
    from r1zero.rollout.interface import Sampling

    wall = time.perf_counter()
    processor = time.process_time()
    engine.weights().commit(0)
    engine.submit(batch, range(len(batch.prompts)), Sampling(1.0, 1.0, 0, seed=0))
    groups = engine.collect(batch.everything)
    wall = time.perf_counter() - wall
    processor = time.process_time() - processor
    assert all(len(sample.tokens) == length for group in groups for sample in group.samples)
    return wall, processor, groups


def share_of_same(ours: Sequence[Group], theirs: Sequence[Group]) -> float:
    """The share of samples with the same tokens."""
    pairs = zip(
        (sample for group in ours for sample in group.samples),
        (sample for group in theirs for sample in group.samples),
        strict=True,
    )
    return float(np.mean([np.array_equal(one.tokens, other.tokens) for one, other in pairs]))


if __name__ == "__main__":
    sys.exit(main())
