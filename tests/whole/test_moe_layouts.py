"""A mixture of experts, whole runs: EP, CP, TP, PP and DP must not change what is sampled or learnt."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.models import make_model
from support.multiproc import run_ranks
from support.worlds import metrics, resolved_run, run, samples

from r1zero.models.config import ModelConfig
from r1zero.models.params import Shards, local_shape, param_table
from r1zero.preflight.resolve import load_config
from r1zero.runtime import _reference

# fp32 sums in another order; further updates carry the difference on.
TOLERANCE = 2e-4
COMPARED = ("reward/mean", "loss", "kl", "entropy", "grad_norm", "response_length/mean")
KV_HEADS = 4  # so that rollout can have TP 4
# A reward that random answers get different amounts of.
REWARD = """
def score(cases):
    return [sum(case.response.encode()) % 7 / 7 for case in cases]
"""


@pytest.fixture(scope="module")
def job(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Two steps of a random model with the tiny model's tokenizer: a Qwen3-MoE, unless the test names
    another family."""
    family = getattr(request, "param", "qwen3_moe")
    folder = tmp_path_factory.mktemp("moe")
    vocabulary = ModelConfig.from_folder(tiny / "model").vocab_size
    make_model(family, folder / "model", vocab_size=vocabulary, num_key_value_heads=KV_HEADS)
    for file in (tiny / "model").glob("*token*"):
        shutil.copy(file, folder / "model")
    (folder / "reward.py").write_text(REWARD)
    return [
        f"actor_rollout.load={folder / 'model'}",
        f"algorithm.verifier_function=[{folder / 'reward.py'}:score]",
        "algorithm.verifier_weight=[1.0]",
        "training.train_iters=2",
        "training.global_batch_size=4",
        "training.eval_data_path=null",
        "training.report_interval=0",
        "actor_rollout.n_samples_per_prompt=4",
        "actor_rollout.ppo_mini_batch_size=8",
        "actor_rollout.micro_batch_size=2",
        "actor_rollout.lr=1e-4",
        "ref.micro_batch_size=2",
        "reward.workers=1",
    ]


@pytest.fixture(scope="module")
def world_of_one(job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("one") / "run", 1, "tiny", job)


FOUR = [
    "actor_rollout.num_gpus_for_train=2",
    "actor_rollout.expert_model_parallel_size=2",
    "actor_rollout.num_gpus_for_infer=1",
    "resource_pool.actor_rollout=[3]",
    "resource_pool.ref=[1]",
]
EIGHT = [
    "training.context_parallel_size=2",
    "training.sequence_parallel=true",
    "actor_rollout.num_gpus_for_train=4",
    "actor_rollout.tensor_model_parallel_size=2",
    "actor_rollout.expert_model_parallel_size=4",
    "actor_rollout.num_gpus_for_infer=2",
    "actor_rollout.infer_tensor_parallel_size=1",
    "actor_rollout.infer_expert_parallel_size=2",
    "ref.expert_model_parallel_size=2",
    "resource_pool.actor_rollout=[6]",
    "resource_pool.ref=[2]",
]


@pytest.mark.parametrize("job", ["qwen3_moe", "deepseek_v3"], indirect=True)
@pytest.mark.parametrize(
    ("size", "layout"),
    [(4, FOUR), (8, EIGHT)],
    ids=["train DP2 EP2", "train TP2 CP2 EP4, rollout DP2 EP2, ref CP2 EP2"],
)
def test_samples_and_metrics_do_not_depend_on_the_layout(job, world_of_one, tmp_path, size, layout):
    folder = run(tmp_path / "run", size, "tiny", job + layout)
    for step in (1, 2):
        expected = samples(world_of_one, step)
        found = samples(folder, step)
        assert len(expected) == len(found) == 16
        for one, other in zip(expected, found, strict=True):
            for key in ("prompt", "response", "reward", "truncated"):
                assert one[key] == other[key], (step, key, one, other)
    for one, other in zip(metrics(world_of_one), metrics(folder), strict=True):
        for key in COMPARED:
            assert other[key] == pytest.approx(one[key], rel=TOLERANCE, abs=TOLERANCE), key
        assert other["mismatch/max"] < 1e-5
        assert other["grad_norm"] > 0


SIXTEEN = [
    "training.train_iters=2",
    "training.sequence_parallel=true",
    "actor_rollout.num_gpus_for_train=8",
    "actor_rollout.tensor_model_parallel_size=2",
    "actor_rollout.pipeline_model_parallel_size=2",
    "actor_rollout.num_layer_list=[1, 3]",
    "actor_rollout.expert_model_parallel_size=4",
    "actor_rollout.num_gpus_for_infer=4",
    "ref.expert_model_parallel_size=4",
    "resource_pool.actor_rollout=[12]",
    "resource_pool.ref=[4]",
]


def assert_trains_and_publishes(job, layout, folder, shards):
    """Two steps of 16 ranks learn with the engine's routes, and each of the four rollout ranks receives
    its shard."""
    run(folder, 16, "tiny", job + SIXTEEN + layout)
    shape = ModelConfig.from_folder(load_config("tiny", job)[0].actor_rollout.load)
    sizes = {spec.name: int(np.prod(local_shape(spec, shards))) for spec in param_table(shape)}
    for step in metrics(folder):
        assert step["publish/bytes"] == 4 * 4 * sum(sizes.values())  # ranks, and bytes of a number
        assert np.isfinite(step["loss"]) and step["grad_norm"] > 0
        assert step["mismatch/max"] < 1e-5 and step["mismatch/router_agreement"] == 1


def test_the_30b_placement_trains_and_each_rollout_rank_gets_its_shard(job, tmp_path):
    """The layout of configs/qwen3_30b_a3b.yaml with half of the ranks, on uneven stages."""
    cfg, _ = load_config("qwen3_30b_a3b")
    actor = cfg.actor_rollout
    assert (actor.tensor_model_parallel_size, actor.pipeline_model_parallel_size) == (2, 2)
    assert actor.num_gpus_for_train == 2 * 8 and actor.expert_model_parallel_size == 2 * 4
    assert actor.num_gpus_for_infer == 2 * 4 and actor.infer_tensor_parallel_size == 4
    assert sum(cfg.resource_pool.ref) == cfg.ref.expert_model_parallel_size == 2 * 4
    layout = ["actor_rollout.infer_tensor_parallel_size=4"]
    assert_trains_and_publishes(job, layout, tmp_path / "run", Shards(tp=4, ep=4))


@pytest.mark.parametrize("job", ["deepseek_v3"], indirect=True)
def test_the_placement_of_deepseek_v3_does_too(job, tmp_path):
    """That of configs/deepseek_v3_671b.yaml with every size cut down: replicas of rollout and of the
    reference share experts."""
    cfg, _ = load_config("deepseek_v3_671b")
    actor = cfg.actor_rollout
    assert actor.expert_model_parallel_size > actor.tensor_model_parallel_size > 1
    assert actor.infer_expert_parallel_size > actor.infer_tensor_parallel_size > 1
    assert cfg.ref.expert_model_parallel_size > cfg.ref.tensor_model_parallel_size > 1
    layout = [
        "actor_rollout.infer_tensor_parallel_size=2",
        "actor_rollout.infer_expert_parallel_size=4",
        "ref.tensor_model_parallel_size=2",
    ]
    assert_trains_and_publishes(job, layout, tmp_path / "run", Shards(tp=2, ep=4))


def reference_body(rank, size, store, overrides):
    """Whether the reference of a run cuts tokens over TP."""
    run, world = resolved_run(rank, size, store, "tiny", overrides)
    return _reference(run, world, ()).model.config.sequence_parallel


def test_a_reference_cuts_tokens_over_tp_where_train_has_none(job, tmp_path):
    """Else each of its TP ranks would send all tokens to the experts."""
    layout = [
        "resource_pool.colocate=true",
        "actor_rollout.num_gpus_for_train=2",
        "actor_rollout.num_gpus_for_infer=2",
        "ref.tensor_model_parallel_size=2",
        "ref.expert_model_parallel_size=2",
        "resource_pool.actor_rollout=[2]",
        "resource_pool.ref=[2]",
        f"output_dir={tmp_path / 'run'}",
    ]
    assert run_ranks(reference_body, 2, job + layout) == [True, True]
