#!/usr/bin/env python3
"""Measure how far trainer and rollout engine lie apart on a mixture of experts, without and with
routing replay. Prints one JSON line.

    python tools/bench_routing_replay.py [--layers 8] [--experts 32] [--top-k 4] [--router-scale 1.0 0.3] [key=value ...]

The model has random weights, the tokenizer and the data are those of the tiny job. By dtype and by what
the routers' weights are multiplied with (less: closer calls), each a run of one step on one rank, whose
samples do not depend on replay: mean and largest |log-prob of the trainer - log-prob of the engine|, and
the share of routers that agree. Other overrides hold for all runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from r1zero.config.command_line import CommandLine
from r1zero.preflight.resolve import load_config

SEED = 7
KEYS = ("mismatch/mean", "mismatch/max", "mismatch/router_agreement")


@dataclass(frozen=True, slots=True)
class Case:
    """A run."""

    dtype: str
    router_scale: float
    replay: bool

    @property
    def name(self) -> str:
        return f"{self.dtype}, routers x {self.router_scale:g}, {'replayed' if self.replay else 'free'}"


def main() -> int:
    args = parse()
    found = {}
    with tempfile.TemporaryDirectory(prefix="bench_routing_replay_") as folder:
        for scale in args.router_scale:
            model = Path(folder) / f"model_{scale:g}"
            make_model(model, args, scale)
            for case in cases(args, scale):
                found[case.name] = train(case, model, Path(folder) / case.name, args.overrides)
    print(json.dumps(found))
    return 0


def cases(args: argparse.Namespace, scale: float) -> Iterator[Case]:
    """The runs with one model."""
    for dtype in args.dtype:
        for replay in (False, True):
            yield Case(dtype, scale, replay)


def make_model(folder: Path, args: argparse.Namespace, scale: float) -> None:
    """Save a random model whose vocabulary is that of the tiny job."""
    import torch
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    cfg, _ = load_config("tiny")
    tokenizer = AutoTokenizer.from_pretrained(cfg.training.tokenizer_name_or_path)
    sizes: dict[str, Any] = dict(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=48,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        norm_topk_prob=True,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                weight.normal_(0, 0.3 * scale)
            elif "norm" not in name:
                weight.normal_(0, 0.08)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(case: Case, model: Path, output: Path, overrides: list[str]) -> dict[str, float | None]:
    """Run one step and read what it measured."""
    command = [
        sys.executable,
        str(ROOT / "r1zero" / "main.py"),
        "--config=tiny",
        f"actor_rollout.load={model}",
        f"actor_rollout.routing_replay={str(case.replay).lower()}",
        f"training.bf16={str(case.dtype == 'bf16').lower()}",
        "training.train_iters=1",
        "training.eval_data_path=null",
        "training.report_interval=0",
        "training.samples_interval=0",
        "algorithm.kl_ctrl.kl_coef=0",
        f"output_dir={output}",
        *overrides,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{case.name}: {(done.stderr or done.stdout).strip()[-2000:]}")
    [line] = (output / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    print(f"{case.name}: {[metrics.get(key) for key in KEYS]}", file=sys.stderr, flush=True)
    return {key: metrics.get(key) for key in (*KEYS, "tokens/response")}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = CommandLine(prog="bench_routing_replay.py", description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--router-scale", type=float, nargs="+", default=[1.0, 0.3])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    return parser.parse_with_overrides()


if __name__ == "__main__":
    sys.exit(main())
