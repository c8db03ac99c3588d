"""Training on NPUs, on the stand-in: norms and RoPE by fused operators, an optimizer in host memory.
Not run on hardware."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.npu_worlds import NpuServer
from support.worlds import SHORT, metrics

from r1zero.models.config import ModelConfig

LAYERS = 2  # of the tiny model


@pytest.mark.parametrize("adapters", [[], ["actor_rollout.lora.rank=4"]], ids=["all", "LoRA"])
def test_every_norm_and_every_rotation_is_one_fused_operator(
    npu: NpuServer, tmp_path: Path, adapters: list[str]
):
    """A layer has two norms, and turns queries and keys; the last norm is one more."""
    job = [*SHORT, *adapters, "training.train_iters=1", f"output_dir={tmp_path / 'run'}"]
    names = ["npu_rms_norm", "npu_rotary_mul", "npu_fusion_attention"]
    [(norms, rotations, attentions)] = npu.run("calls_with_gradients", 1, names, job)
    assert attentions > 0 and attentions % LAYERS == 0
    assert rotations == 2 * attentions
    assert norms == 2 * attentions + attentions // LAYERS


def test_an_optimizer_in_host_memory_learns_and_goes_on_as_one_that_stays(
    npu: NpuServer, tiny: Path, tmp_path: Path
):
    """In bf16, with a break after the first step; device memory is less by what has left."""
    job = [*SHORT, "training.save_interval=1", "actor_rollout.lr_decay_style=constant"]
    leaves = "training.optimizer_offload=true"
    whole = npu.train(tmp_path / "stays", 1, job)
    halves = npu.train(tmp_path / "leaves", 1, [*job, leaves, "training.train_iters=1"])
    npu.train(halves, 1, [*job, leaves])
    peak = "memory/peak_gigabytes/train"
    masters = 4 * ModelConfig.from_folder(tiny / "model").num_parameters / 1e9
    for stays, left in zip(metrics(whole), metrics(halves), strict=True):
        for key in ("loss", "kl", "grad_norm", "mismatch/max", "response_length/mean"):
            assert stays[key] == left[key], key
        assert stays[peak] - left[peak] > 0.99 * masters


def test_ranks_that_share_the_tokens_of_a_microbatch_see_what_the_engine_saw(
    npu: NpuServer, tmp_path: Path
):
    """Policy and reference under context parallelism, of the weights that drew the samples."""
    job = [*SHORT, "training.train_iters=1", "resource_pool.colocate=true"]
    folder = npu.train(tmp_path, 2, [*job, "training.context_parallel_size=2"])
    [line] = metrics(folder)
    assert line["invariants/broken"] == 0, "log-probs are the engine's within the rounding of bf16"
    assert line["kl"] == 0 and line["grad_norm"] > 0
