"""Runs of the program itself, as an item of npu_check.py needs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from npu_checks.check import Check, CheckFailed

ROOT = Path(__file__).resolve().parents[2]
SPAWN = ROOT / "r1zero" / "distributed" / "spawn.py"
MAIN = ROOT / "r1zero" / "main.py"
TINY = ROOT / ".cache" / "tiny" / "model"
CONFIG = "tiny"
# Of a quick look: 16 samples a step.
SMALL = (
    "training.global_batch_size=4",
    "actor_rollout.n_samples_per_prompt=4",
    "actor_rollout.ppo_mini_batch_size=16",
    "actor_rollout.micro_batch_size=4",
    "ref.micro_batch_size=4",
    "reward.workers=1",
)
# Of a model of 0.5B parameters: 64 responses a step.
LARGE = (
    "training.global_batch_size=8",
    "training.seq_length=512",
    "actor_rollout.n_samples_per_prompt=8",
    "actor_rollout.ppo_mini_batch_size=64",
    "actor_rollout.micro_batch_size=4",
    "actor_rollout.max_prompt_length=256",
    "actor_rollout.max_tokens_to_oom=65536",
    "ref.micro_batch_size=4",
)
ALWAYS = ("training.bf16=true", "training.eval_data_path=null", "training.report_interval=0")
ADVICE = "look at the last lines of its output in the JSON, and send us that"


def make_tiny() -> None:
    """Make the embedded model and its problems, if they are not there."""
    subprocess.run([sys.executable, str(ROOT / "tools" / "make_tiny.py")], check=True)


def train(check: Check, name: str, processes: int, overrides: Sequence[str]) -> Path:
    """Train the tiny job with overrides; returns its folder, which goes on if it is there.

    CheckFailed with the run's own sentence when it does not end well.
    """
    folder = check.folder / name
    words = [*ALWAYS, *overrides, f"output_dir={folder}"]
    command = [sys.executable, SPAWN, "--nproc-per-node", processes, MAIN, "--config", CONFIG]
    done = subprocess.run(
        [str(word) for word in (*command, *words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, flush=True)  # the parent keeps its last lines
    if done.returncode:
        raise CheckFailed(f"the run ended with exit code {done.returncode}: {said(done)}", ADVICE)
    return folder


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The last sentence of a run that failed."""
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("r1zero: ")]
    return (own or lines or ["no word"])[-1].removeprefix("r1zero: ")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics of each step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def samples(folder: Path, step: int) -> list[dict[str, Any]]:
    """The samples of a step, in the order of the batch."""
    rows = pq.read_table(folder / "samples" / f"step_{step:06d}.parquet").to_pylist()
    return sorted(rows, key=lambda row: (row["position"], row["member"]))
