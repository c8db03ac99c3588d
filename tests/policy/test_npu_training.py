"""Training on NPUs, on the stand-in: norms and RoPE by fused operators. Not run on hardware."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.npu_worlds import NpuServer
from support.worlds import SHORT

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
