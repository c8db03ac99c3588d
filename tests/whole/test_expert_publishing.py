"""Weights of a mixture of experts on all their ways in a run: to the engines, to a reference that is
reset, to a checkpoint and to the exported model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from support.models import make_model
from support.worlds import SHORT, metrics, run

from r1zero.checkpoint.reference_state import StoredReference
from r1zero.models.config import ModelConfig
from r1zero.models.params import Shards, num_elements, param_table
from r1zero.preflight.resolve import load_config
from r1zero.weights.open import open_weights

# Train TP 2, PP 2 of one and three layers, DP 2, EP 4; rollout TP 2; ref DP 2, EP 2.
LAYOUT = [
    "training.sequence_parallel=true",
    "actor_rollout.num_gpus_for_train=8",
    "actor_rollout.tensor_model_parallel_size=2",
    "actor_rollout.pipeline_model_parallel_size=2",
    "actor_rollout.num_layer_list=[1,3]",
    "actor_rollout.expert_model_parallel_size=4",
    "actor_rollout.num_gpus_for_infer=2",
    "actor_rollout.infer_tensor_parallel_size=2",
    "resource_pool.actor_rollout=[10]",
    "resource_pool.ref=[2]",
    "ref.expert_model_parallel_size=2",
]
RESETS = [
    "ref.reset_interval=1",
    "training.save_interval=1",
    "training.publish_check_interval=1",
    "actor_rollout.lr=1e-3",
    "algorithm.kl_ctrl.kl_coef=0.1",
]


def model_of(family: str, folder: Path) -> Path:
    """A random model with experts, and the tokenizer of tiny."""
    make_model(family, folder)
    tokenizer = Path(load_config("tiny", [])[0].training.tokenizer_name_or_path)
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def test_every_copy_of_the_experts_is_what_was_learnt(tmp_path: Path) -> None:
    model = model_of("qwen3_moe", tmp_path / "start")
    overrides = [*SHORT, *LAYOUT, *RESETS, f"actor_rollout.load={model}"]
    folder = run(tmp_path / "run", 12, "tiny", overrides)
    shape = ModelConfig.from_folder(model)
    table = param_table(shape)
    to_engines = 2 * sum(num_elements(spec, Shards(tp=2, ep=2)) for spec in table)
    to_reference = 2 * sum(num_elements(spec, Shards(ep=2)) for spec in table)
    first, second = metrics(folder)
    # in fp32; the bits were compared, or the run would have ended
    assert first["publish/bytes"] == second["publish/bytes"] == 4 * (to_engines + to_reference)
    assert second["mismatch/max"] < 1e-5, "the engine computes with what it got"
    assert abs(second["kl"]) < 1e-5, "and the reference with the same"
    assert not first["invariants/broken"] and not second["invariants/broken"]

    checkpoint = folder / "checkpoints" / "iter_0000002"
    policy = open_weights(checkpoint, shape)
    copies = [StoredReference(checkpoint, shape), open_weights(folder / "model", shape)]
    start = open_weights(model, shape)
    for spec in table:
        learnt = policy.read(spec)
        assert all(torch.equal(copy.read(spec), learnt) for copy in copies), spec.name
        assert not torch.equal(start.read(spec), learnt), spec.name


def test_a_bias_of_the_choice_stays_in_fp32_on_every_way_of_a_bf16_model(tmp_path: Path) -> None:
    """DeepSeek-V3's, which is not trained: two numbers of bf16 a piece when it is published."""
    model = model_of("deepseek_v3", tmp_path / "start")
    overrides = [*SHORT, *LAYOUT, *RESETS, f"actor_rollout.load={model}", "training.bf16=true"]
    folder = run(tmp_path / "run", 12, "tiny", overrides)
    shape = ModelConfig.from_folder(model)
    table = param_table(shape)
    numbers = 0
    for spec in table:
        of_each = 2 if spec.fp32 else 1
        numbers += 2 * num_elements(spec, Shards(tp=2, ep=2)) * of_each  # two engines' ranks
        numbers += 2 * num_elements(spec, Shards(ep=2)) * of_each  # and two of the reference
    first, second = metrics(folder)
    assert first["publish/bytes"] == second["publish/bytes"] == 2 * numbers
    assert second["mismatch/mean"] < 0.05, "the engine computes with what it got"
    assert not first["invariants/broken"] and not second["invariants/broken"]

    checkpoint = folder / "checkpoints" / "iter_0000002"
    policy = open_weights(checkpoint, shape)
    copies = [StoredReference(checkpoint, shape), open_weights(folder / "model", shape)]
    start = open_weights(model, shape)
    for spec in table:
        learnt = policy.read(spec)
        assert learnt.dtype == (torch.float32 if spec.fp32 else torch.bfloat16)
        assert all(torch.equal(copy.read(spec), learnt) for copy in copies), spec.name
        if spec.fp32:
            assert torch.equal(start.read(spec), learnt), spec.name
