#!/usr/bin/env python3
"""Measure how well the roles of a step work side by side, with each option of the step in turns.
Prints one JSON line.

    python tools/bench_overlap.py [--sigma 0.8 1.2] [--variants NAME ...] [--rounds 2] [--real]

A world of 5 processes (1 train, 3 rollout or as many as --rollout says, 1 ref) trains with the real page, transfers, scheduler of
the engine, updates and publications; each process stands for a replica of configs/qwen25_7b.yaml on
16 NPUs. Compute is slept: a decode step, a forward pass, an update and a publication of the tiny
model last until they have taken the time that the guess for NPUs gives those of the 7B model
(preflight/step_rates.py), --speed times as fast, in units of --shrink tokens. So cores that idle ranks leave
to others change nothing, as long as real work is short against what is slept: `late` is the time
by which it was not, as a share of the steps. --real sleeps nothing.

Lengths are forced: log-normal with a mean of 700 tokens, cut at 2,048, and 80% of the variance of the
logarithm lies between prompts. The data are two global batches, so a prompt comes back every second step.
Medians over all steps but the first two and the last of each world.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from r1zero.distributed import device as devices

DEVICE = devices.prepare("cpu", 0)  # before anything imports Megatron

from r1zero.distributed.groups import World
from r1zero.distributed.launch import Launch
from r1zero.policy import actor, reference
from r1zero.preflight.found import look
from r1zero.preflight.resolve import load_config
from r1zero.preflight.run import resolve
from r1zero.preflight.step_model import Rates
from r1zero.preflight.step_rates import guessed_rates
from r1zero.rollout.engine import NativeEngine
from r1zero.rollout.interface import EngineListener, EngineSetup, Sampling
from r1zero.runtime import Runtime
from r1zero.trainer import prepare, train
from r1zero.types import Batch, Group, Part

# The job that is played: that of docs/scale.md.
PLAYED = "qwen25_7b"
MEAN = 700.0  # tokens of a response
CAP = 2048
PROMPT = 200.0  # tokens
WITHIN = 0.2  # share of the variance of a length's logarithm that lies within a group
STAGES = 4  # of train
MICROBATCH = 2  # responses in a pass of train; of ref
REF_MICROBATCH = 4
RANKS = {"train": 1, "rollout": 3, "ref": 1}
MAX_PROMPT = 32  # tokens of the tiny model's prompts
SECONDS = 900  # until a world is given up

ORDER = ["training.minibatch_order=expected_length"]
OLD = ["algorithm.old_logprobs=rollout"]
ACCUMULATE = ["training.updates=accumulate"]
STALE = ["training.staleness=1"]
# The first is what all are compared with: a part for each minibatch, as it was before there were
# parts of like length.
VARIANTS = {
    "minibatches": ["training.parts={minibatches}"],
    "one_part": ["training.parts=1"],
    "parts": [],
    "order": ORDER,
    "order_old": ORDER + OLD,
    "accumulate": ACCUMULATE,
    "staleness": STALE,
    "all": ORDER + OLD + ACCUMULATE + STALE,
    # Tail batching draws other prompts in other steps: `rollout_tokens_per_second` compares it, over
    # enough steps that those which were put off are among them.
    "tail": ["training.tail_batching=0.8"],
}


@dataclass(slots=True)
class Job:
    """What a world plays."""

    sigma: float  # of the logarithm of lengths
    prompts: int
    samples: int  # of a prompt
    minibatches: int
    shrink: float  # tokens that one of the tiny model's stands for
    speed: float  # that all is played at
    real: bool  # nothing is slept
    steps: int
    data: Path

    @property
    def cap(self) -> int:
        return max(1, round(CAP / self.shrink))

    def lengths(self, batch: Batch) -> np.ndarray:
        """Tokens of each response of a batch, int [P, G]: they follow from prompt and step."""
        rows = []
        for prompt in batch.prompts:
            between = np.random.default_rng([prompt.index]).normal()
            within = np.random.default_rng([prompt.index, batch.step]).normal(size=self.samples)
            deviation = np.sqrt(1 - WITHIN) * between + np.sqrt(WITHIN) * within
            rows.append(np.exp(np.log(MEAN) - self.sigma**2 / 2 + self.sigma * deviation))
        tokens = np.array(rows) / self.shrink
        return np.clip(tokens.round(), 1, self.cap).astype(int)

    def overrides(self, folder: Path, variant: Sequence[str]) -> list[str]:
        """The configuration, over that of the tiny job."""
        engine = f"{Path(__file__).resolve()}:{ForcedEngine.__name__}"
        ours = {
            "output_dir": folder,
            "training.train_iters": self.steps,
            "training.global_batch_size": self.prompts,
            "training.seq_length": MAX_PROMPT + self.cap,
            "training.eval_data_path": "null",
            "training.report_interval": 0,
            "training.samples_interval": 0,
            "training.publish_check_interval": 0,
            "training.on_broken_invariant": "warn",
            "actor_rollout.data_path": self.data,
            "actor_rollout.n_samples_per_prompt": self.samples,
            "actor_rollout.ppo_mini_batch_size": self.prompts * self.samples // self.minibatches,
            "actor_rollout.max_tokens_per_microbatch": 16 * (MAX_PROMPT + self.cap),
            "actor_rollout.max_prompt_length": MAX_PROMPT,
            "actor_rollout.max_tokens_to_oom": self.prompts * self.samples * 2 * self.cap + 4096,
            "actor_rollout.engine": engine,
            "actor_rollout.num_gpus_for_train": RANKS["train"],
            "actor_rollout.num_gpus_for_infer": RANKS["rollout"],
            "ref.max_tokens_per_microbatch": 16 * (MAX_PROMPT + self.cap),
            "reward.workers": 1,
            "algorithm.verifier_function": "[format]",
            "algorithm.verifier_weight": "[1.0]",
            "resource_pool.actor_rollout": f"[{RANKS['train'] + RANKS['rollout']}]",
            "resource_pool.ref": f"[{RANKS['ref']}]",
        }
        chosen = [entry.format(minibatches=self.minibatches) for entry in variant]
        return [f"{key}={value}" for key, value in ours.items()] + chosen


class ForcedEngine(NativeEngine):
    """The native engine, whose responses are as long as they are told to be."""

    forced: Callable[[Batch], np.ndarray]

    @classmethod
    def build(cls, setup: EngineSetup) -> NativeEngine:
        """Make an engine in which nothing ends a response."""
        return super().build(replace(setup, end_ids=()))

    def submit(
        self,
        batch: Batch,
        positions: Sequence[int],
        sampling: Sampling,
        budgets: np.ndarray | None = None,
    ) -> None:
        self._lengths = self.forced(batch)
        most = self._lengths if budgets is None else np.minimum(self._lengths, budgets)
        super().submit(batch, positions, sampling, most)

    def collect(self, part: Part) -> list[Group]:
        """Groups whose responses are as long as they were to be have ended."""
        groups = super().collect(part)
        for group in groups:
            wanted = self._lengths[group.position].tolist()
            for sample, length in zip(group.samples, wanted, strict=True):
                sample.truncated = len(sample.tokens) < length
        return groups


# -- slept compute ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Pace:
    """Lets work last as long as it would on the hardware that is played."""

    rates: Rates
    job: Job
    real: float = 0.0  # seconds that work took itself
    late: float = 0.0  # seconds of it beyond those that it should have taken
    _decoding: tuple[float, float] | None = field(default=None)  # since when; for how long

    def last(self, since: float, seconds: float) -> None:
        """Sleep until work that began at `since` has lasted the played seconds."""
        if self.job.real:
            return
        took = time.perf_counter() - since
        rest = seconds / self.job.speed - took
        self.real += took
        if rest > 0:
            time.sleep(rest)
        else:
            self.late -= rest

    def paced(self, work: Callable[..., Any], seconds: Callable[..., float]) -> Callable[..., Any]:
        """The same work with a duration that follows from its arguments."""

        def lasting(*args: Any, **kwargs: Any) -> Any:
            since = time.perf_counter()
            result = work(*args, **kwargs)
            self.last(since, seconds(*args, **kwargs))
            return result

        return lasting

    def learning(
        self, _model: Any, _module: Any, microbatches: list[list], *_: Any, **__: Any
    ) -> float:
        """Seconds of the forward and backward passes of an update, or of a part of it."""
        return self.rates.learn * self._tokens(microbatches, MICROBATCH) * _bubble(microbatches)

    def looking_back(self, _model: Any, _module: Any, microbatches: list[list], *_: Any) -> float:
        """Seconds in which train computes old log-probs."""
        return self.rates.look * self._tokens(microbatches, MICROBATCH) * _bubble(microbatches)

    def referring(self, _model: Any, _module: Any, microbatches: list[list], *_: Any) -> float:
        """Seconds in which ref computes its log-probs."""
        return self.rates.ref * self._tokens(microbatches, REF_MICROBATCH)

    def _tokens(self, microbatches: list[list], prompts_of: int) -> float:
        """Tokens that the played model reads: a prompt once for each of its microbatches."""
        items = [item for microbatch in microbatches for item in microbatch]
        responses = sum(len(item.sample.tokens) for item in items)
        return responses * self.job.shrink + len(items) * PROMPT / prompts_of

    def pace_engine(self, engine: Any) -> None:
        """Let each decode step of the engine, with sampling, last as long as the played one."""
        decode = engine.decoder.decode

        def begin(newest: np.ndarray, *rest: Any) -> torch.Tensor:
            rows = len(newest)
            seconds = self.rates.decode_step + self.rates.decode_row * rows
            self._decoding = time.perf_counter(), seconds * self.job.shrink
            return decode(newest, *rest)

        def end() -> None:
            if self._decoding is not None:
                self.last(*self._decoding)
                self._decoding = None

        engine.decoder.decode = begin
        engine.listeners.append(EngineListener(on_step=end))

    def pace(self, runtime: Runtime) -> None:
        """Pace all that this rank computes."""
        world = runtime.world
        engine: Any = runtime.engine
        policy: Any = runtime.policy
        publisher: Any = runtime.publisher
        if world.rollout.member:
            engine.forced = self.job.lengths
        if self.job.real:
            return
        if world.rollout.member:
            self.pace_engine(engine)
        if world.train.member:
            actor.run_pipeline = self.paced(actor.run_pipeline, self.learning)
            actor.compute_logprobs = self.paced(actor.compute_logprobs, self.looking_back)
            optimizer = policy.optimizer
            optimizer.step = self.paced(optimizer.step, lambda: self.rates.optimizer)
        if world.ref is not None and world.ref.member:
            reference.compute_logprobs = self.paced(reference.compute_logprobs, self.referring)
        publisher.publish = self.paced(publisher.publish, lambda _: self.rates.publish)


def _bubble(microbatches: list[list]) -> float:
    """How much longer train's pipeline takes than without its filling and draining."""
    count = max(1.0, sum(map(len, microbatches)) / MICROBATCH)
    return (count + STAGES - 1) / count


# -- worlds ----------------------------------------------------------------------------------------


def rank_body(rank: int, folder: Path, job: Job, rates: Rates, overrides: list[str]) -> None:
    """One rank of a world, from its start to its end."""
    torch.set_num_threads(1)
    log = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    size = sum(RANKS.values())
    store = dist.FileStore(str(folder / "store"), size)
    config, warnings = load_config("tiny", overrides)
    run = resolve(config, warnings, size, [0] * size)
    launch = Launch("single", rank, size, 0, (0,) * size, "", 0)
    world = World(launch, run.placement, DEVICE, timedelta(seconds=SECONDS), store)
    runtime = prepare(run, world)
    assert runtime is not None, "the folder is new"
    pace = Pace(rates, job)
    pace.pace(runtime)
    train(runtime)
    (folder / f"pace_{rank}.json").write_text(json.dumps([pace.real, pace.late]))
    dist.destroy_process_group()
    os._exit(0)


def play(job: Job, rates: Rates, variant: Sequence[str]) -> dict[str, list[float]]:
    """Run a world; returns, of each step that counts, its seconds, tokens a second, idle shares;
    and of each rank the shares of time that work took and was late by."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = job.overrides(folder / "run", variant)
        ranks = [
            fork.Process(target=rank_body, args=(rank, folder, job, rates, overrides))
            for rank in range(sum(RANKS.values()))
        ]
        for process in ranks:
            process.start()
        try:
            wait_for(ranks, folder)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        paces = [
            json.loads((folder / f"pace_{rank}.json").read_text()) for rank in range(len(ranks))
        ]
    whole = sum(step["time/step"] for step in steps)
    counted = steps[2:-1]
    found = {
        "seconds": [step["time/step"] for step in counted],
        "tokens_per_second": [step["tokens/response"] / step["time/step"] for step in counted],
        "rollout_tokens_per_second": [
            sum(step["tokens/response"] for step in counted)
            / sum(step["time/rollout"] for step in counted)
        ],
        "busiest": [max(real for real, _ in paces) / whole],
        "late": [max(late for _, late in paces) / whole],
    }
    for role in RANKS:
        found[f"idle_{role}"] = [step[f"time/wait/{role}"] / step["time/step"] for step in counted]
    return found


def wait_for(ranks: list, folder: Path) -> None:
    """Wait until all have ended well. SystemExit as soon as one has not, with the end of its log, or
    when it takes too long."""
    deadline = time.monotonic() + SECONDS
    while any(process.exitcode is None for process in ranks):
        for rank, process in enumerate(ranks):
            if process.exitcode:
                log = (folder / f"rank_{rank}.log").read_text()
                raise SystemExit(f"bench_overlap.py: rank {rank} failed:\n{log[-2000:]}")
        if time.monotonic() > deadline:
            raise SystemExit(f"bench_overlap.py: a world was not done after {SECONDS} s")
        time.sleep(0.05)


def main() -> int:
    """Run the benchmark."""
    args = parse()
    RANKS["rollout"] = args.rollout
    config, _ = load_config(PLAYED, [])
    found = look(config)
    assert found.placement is not None and found.actor.shape is not None, PLAYED
    rates = guessed_rates(config, found.placement, found.actor.shape)
    result: dict[str, Any] = {
        key: getattr(args, key)
        for key in (
            "prompts",
            "samples",
            "minibatches",
            "shrink",
            "speed",
            "real",
            "rollout",
            "steps",
            "rounds",
        )
    }
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "two_batches.parquet"
        rows = pq.read_table(ROOT / ".cache" / "tiny" / "train.parquet")
        pq.write_table(rows.slice(0, 2 * args.prompts), data)
        for sigma in args.sigma:
            job = Job(
                sigma=sigma,
                prompts=args.prompts,
                samples=args.samples,
                minibatches=args.minibatches,
                shrink=args.shrink,
                speed=args.speed,
                real=args.real,
                steps=args.steps,
                data=data,
            )
            result[f"sigma_{sigma:g}"] = measure(args, job, rates)
    print(json.dumps(result))
    return 0


def measure(args: argparse.Namespace, job: Job, rates: Rates) -> dict[str, dict[str, float]]:
    """The figures of each variant, which take turns."""
    seen: dict[str, dict[str, list[float]]] = {name: {} for name in args.variants}
    for _ in range(args.rounds):
        for name in args.variants:
            for key, values in play(job, rates, VARIANTS[name]).items():
                seen[name].setdefault(key, []).extend(values)
            if args.verbose:
                print(job.sigma, name, figures(seen[name]), file=sys.stderr)
    result = {name: figures(of_variant) for name, of_variant in seen.items()}
    first = result[args.variants[0]]["seconds"]
    for of_variant in result.values():
        of_variant["ratio"] = round(first / of_variant["seconds"], 3)
    return result


def figures(values: dict[str, list[float]]) -> dict[str, float]:
    """Medians."""
    return {key: round(statistics.median(those), 3) for key, those in values.items()}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.8, 1.2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=8)
    parser.add_argument("--shrink", type=float, default=32, help="tokens that one token stands for")
    parser.add_argument("--rollout", type=int, default=RANKS["rollout"], help="rollout ranks")
    parser.add_argument("--speed", type=float, default=10, help="that all is played at")
    parser.add_argument("--real", action="store_true", help="sleep nothing")
    parser.add_argument("--steps", type=int, default=7, help="of a world")
    parser.add_argument("--rounds", type=int, default=1, help="that each variant takes its turn in")
    parser.add_argument("--verbose", action="store_true", help="tell of each world")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
