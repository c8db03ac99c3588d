#!/usr/bin/env python3
"""Measure a whole GRPO step on this CPU, alone or beside TRL's GRPOTrainer. Prints one JSON line.

    pip install -e '.[cpu,bench]'
    python tools/bench_step.py --model models/SmolLM2-135M-Instruct --data data/mawps_train.parquet
    python tools/bench_step.py --model ... --data ... --vs none      ours alone; needs no TRL
    python tools/bench_step.py --model ... --data ... --split        where reference and update take time

The same model, prompts, number of samples, longest response, temperature, KL term with a reference
model, one update a step, two cores. Ours is the program itself as it would be used: two ranks with
all roles and a thread each, bf16 weights with fp32 master weights (--dtype). TRL is one process with as many
threads, weights and moments in bf16, fused AdamW, no gradient checkpointing, all responses
generated in one call and learnt from in microbatches of --trl-batch. Responses end by themselves,
so their mean lengths are printed, too. Each system takes its first step unmeasured; of the others
the median. The systems take turns, --rounds times. With --split one more step of ours is traced, unmeasured:
tools/trace_split.py counts what its products, attention, logits and the rest take, and what share of
the speed of a large product of one thread a phase reaches.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "tools")]

from trace_split import Split, read, split

CONFIG = "smollm2_135m_gsm8k"
TEMPLATE = "two_shot_chat"
MAX_PROMPT = 512
TEMPERATURE = 0.8
KL_COEF = 0.01
LR = 1e-5
PHASES = ("time/step", "time/rollout", "time/ref", "time/update")
MEMORY = "memory/peak_gigabytes/train"  # of a process, which has all roles
# Operations a second of a large product, in a process of its own.
PEAK = """
import sys, time, torch
torch.set_num_threads(1)
a, b = torch.randn(2, 2048, 2048).to(getattr(torch, sys.argv[1]))
seconds = []
for _ in range(4):
    start = time.perf_counter()
    a @ b
    seconds.append(time.perf_counter() - start)
print(2 * 2048**3 / min(seconds))
"""


def main() -> int:
    """Run the benchmark, or TRL's part of it; returns the exit code."""
    args = parse()
    if args.trl_only:
        print(json.dumps(trl_steps(args)))
        return 0
    if problems := check(args):
        print(f"bench_step.py: {'; '.join(problems)}", file=sys.stderr)
        return 2
    ours = []
    theirs = []
    splits = []
    for _ in range(args.rounds):
        steps, traced = our_steps(args)
        ours += steps
        splits.append(traced)
        if args.vs == "trl":
            theirs += in_process_of_its_own([*sys.argv[1:], "--trl-only"], args.threads)
    result = {
        key: getattr(args, key)
        for key in ("prompts", "samples", "max_new_tokens", "threads", "steps", "rounds")
    }
    result |= {"model": args.model.name, "data": args.data.name, "dtype": args.dtype}
    result |= {f"ours_{name.split('/')[-1]}_seconds": median(ours, name) for name in PHASES}
    result["ours_mean_length"] = median(ours, "response_length/mean")
    result["ours_peak_gigabytes"] = max(step[MEMORY] for step in ours)
    if args.split:
        result |= {f"ours_{name}": value for name, value in split_of(splits, args.dtype).items()}
    if theirs:
        result["trl_step_seconds"] = median(theirs, "time/step")
        result["trl_mean_length"] = median(theirs, "response_length/mean")
        result["ratio"] = result["trl_step_seconds"] / result["ours_step_seconds"]
    print(
        json.dumps(
            {
                key: round(value, 3) if isinstance(value, float) else value
                for key, value in result.items()
            }
        )
    )
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument(
        "--data", type=Path, required=True, help="parquet with question and ground_truth_answer"
    )
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="of a round; the first is not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--vs", choices=("trl", "none"), default="trl", help="beside what")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--split", action="store_true", help="trace one more step of ours")
    parser.add_argument("--trl-batch", type=int, default=8, help="responses in TRL's microbatch")
    parser.add_argument("--trl-only", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def check(args: argparse.Namespace) -> list[str]:
    """What keeps the benchmark from running, a sentence each."""
    problems = [
        f"--{name}: {path} does not exist"
        for name, path in (("model", args.model), ("data", args.data))
        if not path.exists()
    ]
    least = {
        "prompts": 1,
        "samples": 2,
        "max_new_tokens": 1,
        "threads": 1,
        "steps": 2,
        "rounds": 1,
        "trl_batch": 1,
    }
    problems += [
        f"--{name.replace('_', '-')}: {getattr(args, name)} must be at least {minimum}"
        for name, minimum in least.items()
        if getattr(args, name) < minimum
    ]
    if not problems and args.prompts * args.samples % args.trl_batch:
        problems.append(
            f"--trl-batch: {args.trl_batch} must divide the {args.prompts * args.samples} responses"
        )
    if args.vs == "trl" and importlib.util.find_spec("trl") is None:
        problems.append("TRL is not installed; `pip install -e '.[bench]'`, or --vs none")
    return problems


def median(steps: list[dict[str, float]], name: str) -> float:
    """The median of a figure over all measured steps."""
    return statistics.median(step[name] for step in steps)


def split_of(rounds: list[dict[str, Split]], dtype: str) -> dict[str, float]:
    """The medians over the rounds of what a traced step says of its phases, by "phase_name"."""
    word = {"bf16": "bfloat16", "fp32": "float32"}[dtype]
    peak = float(run([sys.executable, "-c", PEAK, word], threads=1))
    reports = []
    for phases in rounds:
        told: dict[str, float] = {}
        for phase, found in phases.items():
            told |= {f"{phase}_{name}": value for name, value in found.report(peak).items()}
        reports.append(told)
    medians = {name: median(reports, name) for name in reports[0]}
    return medians | {"thread_gigaflops": peak / 1e9}


def our_steps(
    args: argparse.Namespace,
) -> tuple[list[dict[str, float]], dict[str, Split]]:
    """Train with this project; returns the metrics of each measured step, and the split of a traced
    one, if asked for."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = {
            "output_dir": folder,
            "training.train_iters": args.steps + args.split,
            "training.profile_steps": f"[{args.steps + 1}]" if args.split else "[]",
            "training.bf16": str(args.dtype == "bf16").lower(),
            "training.global_batch_size": args.prompts,
            "training.seq_length": MAX_PROMPT + args.max_new_tokens,
            "training.prompt_type": TEMPLATE,
            "training.report_interval": 0,
            "actor_rollout.load": args.model,
            "actor_rollout.data_path": args.data,
            "actor_rollout.n_samples_per_prompt": args.samples,
            "actor_rollout.temperature": TEMPERATURE,
            "actor_rollout.ppo_mini_batch_size": args.prompts * args.samples,
            "actor_rollout.lr": LR,
            "actor_rollout.lr_warmup_iters": 0,
            "actor_rollout.max_prompt_length": MAX_PROMPT,
            "algorithm.kl_ctrl.kl_coef": KL_COEF,
            "resource_pool.actor_rollout": f"[{args.threads}]",
        }
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            args.threads,
            ROOT / "r1zero" / "main.py",
            "--config",
            CONFIG,
            *(f"{key}={value}" for key, value in overrides.items()),
        ]
        run(command, threads=1)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines[1 : args.steps]]
        traces = sorted((Path(folder) / "profile").rglob("*.json.gz"))
        return steps, split(read(traces[0])) if args.split else {}


def in_process_of_its_own(arguments: list[str], threads: int) -> list[dict[str, float]]:
    """Run this file with other arguments; returns what it prints last."""
    return json.loads(run([sys.executable, __file__, *arguments], threads).splitlines()[-1])


def run(command: list, threads: int) -> str:
    """Run a command with so many threads; returns its output. SystemExit with its errors if it
    fails."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [str(word) for word in command], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(
            f"bench_step.py: {Path(str(command[1])).name} failed:\n{done.stderr[-4000:]}"
        )
    return done.stdout


def trl_steps(args: argparse.Namespace) -> list[dict[str, float]]:
    """Train with TRL; returns seconds and mean response length of each measured step."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(args.threads)
    steps: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        """Times each step, from its first microbatch, which generates, to the end of its update."""

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            steps.append({"time/step": time.perf_counter() - self.began})

        def on_log(self, *_: object, **told: Any) -> None:
            if "completions/mean_length" in told["logs"]:
                steps[-1]["response_length/mean"] = told["logs"]["completions/mean_length"]

    with tempfile.TemporaryDirectory() as folder:
        batch = args.prompts * args.samples
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            fp16=False,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "bfloat16" if args.dtype == "bf16" else "float32"},
            per_device_train_batch_size=args.trl_batch,
            gradient_accumulation_steps=batch // args.trl_batch,
            num_generations=args.samples,
            max_completion_length=args.max_new_tokens,
            temperature=TEMPERATURE,
            beta=KL_COEF,
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_steps=args.steps,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=str(args.model),
            reward_funcs=scores,
            args=config,
            callbacks=[Clock()],
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts(args)]),
        )
        trainer.train()
    return steps[1:]


def prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of our first steps, as text."""
    from r1zero.data.layout import ColumnLayout
    from r1zero.data.prompts import Prompts, load_tokenizer
    from r1zero.data.sources import DataSource
    from r1zero.data.template import Template

    columns = {"prompt": "question", "query": "", "response": "ground_truth_answer", "system": ""}
    tokenizer = load_tokenizer(args.model)
    layout = ColumnLayout(columns)
    source = DataSource(key="--data", path=args.data, layout=layout, prompt_type=TEMPLATE)
    stream = Prompts([source], {TEMPLATE: Template(TEMPLATE)}, tokenizer, MAX_PROMPT, 1234)
    return [prompt.text for prompt in stream.draw(0, args.prompts * args.steps)]


def scores(completions: list[str], **_: object) -> list[float]:
    """Rewards that differ within a group; what they are does not matter for the time."""
    return [float(len(text) % 2) for text in completions]


if __name__ == "__main__":
    sys.exit(main())
