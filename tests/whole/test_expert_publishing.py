"""Weights of a mixture of experts on all their ways in a run: to the engines, to a reference that is
reset, to a checkpoint and to the exported model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with eight experts in each of four layers, and the tokenizer of tiny."""
    folder = tmp_path_factory.mktemp("moe")
    make_model("qwen3_moe", folder)
    tokenizer = Path(load_config("tiny", [])[0].training.tokenizer_name_or_path)
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def test_every_copy_of_the_experts_is_what_was_learnt(model: Path, tmp_path: Path) -> None:
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
