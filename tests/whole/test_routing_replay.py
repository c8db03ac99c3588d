"""Routing replay in whole runs of a random mixture of experts: engine, transport, trainer, metrics."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.models import make_model
from support.multiproc import run_ranks
from support.patience import LONG
from support.worlds import SHORT, metrics, resolved_run, run

from r1zero.preflight.resolve import load_config
from r1zero.trainer import prepare, train

AGREEMENT = "mismatch/router_agreement"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    """What makes one step of the tiny job one of a random model with 16 experts in each of 4
    layers."""
    folder = tmp_path_factory.mktemp("moe")
    make_model("qwen3_moe", folder, num_experts=16)
    tokenizer = Path(load_config("tiny")[0].training.tokenizer_name_or_path)
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, folder)
    return [*SHORT, "training.train_iters=1", f"actor_rollout.load={folder}"]


def preempting_body(rank: int, size: int, store: object, overrides: list[str]) -> int:
    """Train; returns how often samples made room for others on this rank."""
    runtime = prepare(*resolved_run(rank, size, store, "tiny", overrides))
    train(runtime)
    return getattr(runtime.engine, "preemptions", 0)


def test_in_fp32_trainer_and_engine_agree_on_the_way_past_a_reference(overrides, tmp_path):
    """Two replicas whose ranks share the experts; samples that make room for others in the engine's
    cache; two updates, so that the second one looks back with the same routes."""
    layout = [
        "actor_rollout.num_gpus_for_train=2",
        "actor_rollout.expert_model_parallel_size=2",
        "actor_rollout.num_gpus_for_infer=1",
        "resource_pool.actor_rollout=[3]",
        "training.seq_length=128",
        "actor_rollout.max_tokens_to_oom=256",
        "actor_rollout.ppo_mini_batch_size=8",
        "actor_rollout.recompute_granularity=full",
    ]
    layout.append(f"output_dir={tmp_path}")
    preemptions = run_ranks(preempting_body, 4, [*overrides, *layout], timeout_seconds=LONG)
    assert max(preemptions) > 0
    [step] = metrics(tmp_path)
    assert step["updates"] == 2
    assert step["mismatch/max"] < 1e-5
    assert step[AGREEMENT] > 0.999  # two experts may be equally good even in fp32


def test_in_bf16_replay_brings_trainer_and_engine_closer(overrides, tmp_path):
    bf16 = [*overrides, "training.bf16=true", "algorithm.kl_ctrl.kl_coef=0"]
    [replayed] = metrics(run(tmp_path / "replayed", 1, "tiny", bf16))
    free_routers = [*bf16, "actor_rollout.routing_replay=false"]
    [free] = metrics(run(tmp_path / "free", 1, "tiny", free_routers))
    assert free["tokens/response"] == replayed["tokens/response"], "the same samples"
    assert AGREEMENT not in free
    assert 0.5 < replayed[AGREEMENT] < 1
    assert replayed["mismatch/max"] < free["mismatch/max"]
    assert replayed["mismatch/mean"] < free["mismatch/mean"]
