"""Run folders for the tests of the report, written without training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

QUESTIONS = 16
Text = Callable[[int, int, int], str]  # of (step, position, member)


def question(index: int) -> str:
    return f"<|im_start|>user\nWhat is {index}+{index}?<|im_end|>\n<|im_start|>assistant\n"


def plain(step: int, position: int, member: int) -> str:
    return (
        f"<think>step {step}, member "
        f"{member}</think><answer>\\boxed{{{2 * position}}}</answer><|im_end|>"
    )


def write_step(
    folder: Path,
    step: int,
    text: Text = plain,
    prompts: int = QUESTIONS,
    samples: int = 8,
    **metrics: object,
) -> None:
    """Append a step to a run folder: metrics, spans of two ranks, and samples with `text` as
    responses."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "samples").mkdir(exist_ok=True)
    random = np.random.default_rng(step)
    entry = {
        "step": step,
        "reward/mean": random.normal(),
        "reward/acc": random.normal(),
        "reward/acc/right": 0.5,
        "response_length/mean": 20 + step,
        "response_length/max": 90,
        "kl": 0.001 * step,
        "time/step": 2.0,
        "time/rollout": 1.0,
        "time/update": 0.5,
        "reward/equal_groups": 0.25,
        "entropy": random.random(),
    }
    append(folder / "metrics.jsonl", entry | metrics)
    spans = [
        [0, "update", 1e9 + step + 0.4, 1e9 + step + 1.0],
        [1, "rollout", 1e9 + step, 1e9 + step + 0.5],
    ]
    append(
        folder / "logs" / "spans.jsonl",
        {"step": step, "roles": [["train"], ["rollout"]], "spans": spans},
    )
    rows = [
        {
            "position": p,
            "member": m,
            "prompt_index": 100 + p,
            "prompt": question(p),
            "response": text(step, p, m),
            "ground_truth": str(2 * p),
            "reward": float(m % 2),
            "advantage": m - 3.5,
            "prompt_length": 9,
            "response_length": 10 + m,
            "truncated": m == 7,
            "weights_version": step - 1,
            "failure": "",
            "score/acc": float(m % 2),
            "outcome/acc": "right" if m % 2 else "wrong",
        }
        for p in range(prompts)
        for m in range(samples)
    ]
    pq.write_table(pa.Table.from_pylist(rows), samples_path(folder, step))


def samples_path(folder: Path, step: int) -> Path:
    return folder / "samples" / f"step_{step:06d}.parquet"


def append(path: Path, entry: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def write_run(
    folder: Path, steps: int, text: Text = plain, prompts: int = QUESTIONS, samples: int = 8
) -> Path:
    """Write a whole run folder."""
    for step in range(1, steps + 1):
        write_step(folder, step, text, prompts, samples)
    (folder / "config.yaml").write_text(f"name: {folder.name}\ntraining:\n  train_iters: {steps}\n")
    return folder


def add_model(folder: Path, step: int, score: Callable[[int, int, int], float | None]) -> None:
    """Let a reward model have scored the samples of a step by `score` of (step, position, member);
    None: it could not read them."""
    path = samples_path(folder, step)
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        value = score(step, row["position"], row["member"])
        row["score/model"] = math.nan if value is None else value
        row["outcome/model"] = "too_long" if value is None else "graded"
        if value is None:
            row["failure"] = "model: 600 tokens, and the reward model has 512 positions"
    pq.write_table(pa.Table.from_pylist(rows), path)
