"""The layout of ranks must not change what is sampled or learnt; and the pipeline must overlap."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.models import make_model
from support.worlds import metrics, run, samples, spans

from r1zero.models.config import ModelConfig
from r1zero.models.params import Shards, local_shape, param_table
from r1zero.preflight.resolve import load_config

# fp32 sums in another order; further updates carry the difference on.
TOLERANCE = 2e-4
COMPARED = (
    "reward/mean",
    "loss",
    "kl",
    "entropy",
    "grad_norm",
    "lr",
    "response_length/mean",
    "clip_fraction",
)
# Of the first step, whose samples are the same to the last token.
SAME = ("reward/mean", "reward/acc", "reward/format", "reward/equal_groups", "response_length/mean")
# Two updates a step, so that later minibatches need old log-probs of the weights that drew them.
COMMON = [
    "training.train_iters=2",
    "training.global_batch_size=8",
    "actor_rollout.ppo_mini_batch_size=32",
    "training.eval_data_path=null",
    "actor_rollout.lr=1e-4",
    "actor_rollout.micro_batch_size=8",
    "ref.micro_batch_size=8",
]
EIGHT = [
    "actor_rollout.num_gpus_for_train=4",
    "actor_rollout.tensor_model_parallel_size=2",
    "actor_rollout.num_gpus_for_infer=2",
    "actor_rollout.infer_tensor_parallel_size=2",
    "training.sequence_parallel=true",
    "resource_pool.actor_rollout=[6]",
    "resource_pool.ref=[2]",
]
COLOCATED = [
    "resource_pool.colocate=true",
    "resource_pool.actor_rollout=[4]",
    "resource_pool.ref=[]",
    "actor_rollout.pipeline_model_parallel_size=2",
    "ref.tensor_model_parallel_size=2",
    "actor_rollout.infer_tensor_parallel_size=1",
]


@pytest.fixture(scope="module")
def world_of_one(tiny, tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("one"), 1, "tiny", COMMON)


@pytest.mark.parametrize(
    ("size", "layout"),
    [(4, []), (8, EIGHT), (4, COLOCATED)],
    ids=["2 rollout 1 train 1 ref", "train TP2 DP2 rollout TP2 ref DP2", "4 colocated, train PP2"],
)
def test_samples_and_metrics_do_not_depend_on_the_layout(world_of_one, tmp_path, size, layout):
    folder = run(tmp_path, size, "tiny", COMMON + layout)
    expected, found = samples(world_of_one, 1), samples(folder, 1)
    assert len(expected) == 64
    for one, other in zip(expected, found, strict=True):
        for key in (
            "prompt",
            "response",
            "ground_truth",
            "reward",
            "score/acc",
            "score/format",
            "truncated",
        ):
            assert one[key] == other[key], (key, one, other)
        assert abs(one["advantage"] - other["advantage"]) < 1e-12
    replicas = {4: 2, 8: 1}[size] if layout != COLOCATED else 4
    path = folder / "samples" / "step_000001.parquet"
    assert len(list(path.iterdir())) == replicas if replicas > 1 else path.is_file()
    for one, other in zip(metrics(world_of_one), metrics(folder), strict=True):
        for key in COMPARED:
            assert other[key] == pytest.approx(one[key], rel=TOLERANCE, abs=TOLERANCE), (
                one["step"],
                key,
            )
        for key in SAME:
            if one["step"] == 1:
                assert other[key] == one[key], key
        assert other["mismatch/max"] < 1e-3 and other["updates"] == 2


def test_replicas_without_a_prompt_harm_nothing(tiny, tmp_path):
    """Two prompts and two held-out problems for three replicas of each role; a minibatch is one
    prompt, and microbatches divide nothing."""
    table = pq.read_table(tiny / "eval.parquet").slice(0, 2)
    pq.write_table(table, tmp_path / "two.parquet")
    common = [
        "training.train_iters=2",
        "training.global_batch_size=2",
        "actor_rollout.n_samples_per_prompt=5",
        "actor_rollout.ppo_mini_batch_size=5",
        "actor_rollout.micro_batch_size=3",
        "ref.micro_batch_size=4",
        f"training.eval_data_path={tmp_path}/two.parquet",
    ]
    idle = [
        "resource_pool.colocate=true",
        "resource_pool.actor_rollout=[3]",
        "resource_pool.ref=[]",
    ]
    one = run(tmp_path / "one", 1, "tiny", common)
    three = run(tmp_path / "three", 3, "tiny", common + idle)
    for step in (1, 2):
        for mine, other in zip(samples(one, step), samples(three, step), strict=True):
            assert mine["response"] == other["response"] and mine["reward"] == other["reward"]
    for mine, other in zip(metrics(one), metrics(three), strict=True):
        for key in COMPARED:
            assert other[key] == pytest.approx(mine[key], rel=TOLERANCE, abs=TOLERANCE), key
    answers = [
        json.loads((folder / "evaluation" / "step_000000.json").read_text())["scores"]
        for folder in (one, three)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "option",
    [
        ["training.minibatch_order=expected_length", "algorithm.old_logprobs=rollout"],
        ["training.updates=accumulate", "training.parts=5"],
        ["training.staleness=1", "training.parts=3", "training.train_iters=3"],
    ],
    ids=["by expected length, ratio to the engine", "one update", "one step off"],
)
def test_options_of_the_step_do_not_depend_on_the_layout(tiny, tmp_path, option):
    folders = []
    for size, layout in ((1, []), (4, []), (8, EIGHT)):
        folders.append(run(tmp_path / str(size), size, "tiny", COMMON + option + layout))
    one, *others = folders
    for other in others:
        for step in (1, 2) if "training.staleness=1" in option else (1,):
            for row, again in zip(samples(one, step), samples(other, step), strict=True):
                assert row["prompt"] == again["prompt"] and row["response"] == again["response"]
                assert row["weights_version"] == again["weights_version"] == 0
        for line, again in zip(metrics(one), metrics(other), strict=True):
            for key in COMPARED:
                assert again[key] == pytest.approx(line[key], rel=TOLERANCE, abs=TOLERANCE), key
    updates = 1 if "training.updates=accumulate" in option else 2
    assert [line["updates"] for line in metrics(one)] == [updates] * len(metrics(one))


def test_the_samples_are_the_same_again_and_others_with_another_seed(world_of_one, tmp_path):
    again = run(tmp_path / "again", 1, "tiny", [*COMMON, "training.train_iters=1"])
    other = run(
        tmp_path / "other", 1, "tiny", [*COMMON, "training.train_iters=1", "training.seed=7"]
    )
    texts = [
        [row["response"] for row in samples(folder, 1)] for folder in (world_of_one, again, other)
    ]
    assert texts[0] == texts[1] and texts[0] != texts[2]


@pytest.fixture
def small_qwen(tiny, tmp_path) -> Path:
    """A random Qwen2 of 4 layers, with the tiny model's tokenizer."""
    folder = tmp_path / "qwen"
    make_model("qwen2", folder, vocab_size=ModelConfig.from_folder(tiny / "model").vocab_size)
    for file in (tiny / "model").glob("*token*"):
        shutil.copy(file, folder)
    return folder


def test_the_7b_placement_trains_and_each_rollout_rank_gets_its_shard(tiny, small_qwen, tmp_path):
    # The layout of configs/qwen25_7b.yaml: 8 train TP2 PP4, 6 rollout TP2, 2 ref TP2.
    cfg, _ = load_config("qwen25_7b")
    actor, ref = cfg.actor_rollout, cfg.ref
    layout = (
        actor.num_gpus_for_train,
        actor.tensor_model_parallel_size,
        actor.pipeline_model_parallel_size,
        actor.num_gpus_for_infer,
        actor.infer_tensor_parallel_size,
        sum(cfg.resource_pool.ref),
        ref.tensor_model_parallel_size,
    )
    assert layout == (8, 2, 4, 6, 2, 2, 2)
    overrides = [
        f"actor_rollout.load={small_qwen}",
        "training.train_iters=2",
        "training.global_batch_size=12",
        "actor_rollout.n_samples_per_prompt=4",
        "actor_rollout.ppo_mini_batch_size=24",
        "training.eval_data_path=null",
        "actor_rollout.micro_batch_size=2",
        "ref.micro_batch_size=4",
        "training.sequence_parallel=true",
        "actor_rollout.num_gpus_for_train=8",
        "actor_rollout.tensor_model_parallel_size=2",
        "actor_rollout.pipeline_model_parallel_size=4",
        "actor_rollout.num_gpus_for_infer=6",
        "actor_rollout.infer_tensor_parallel_size=2",
        "ref.tensor_model_parallel_size=2",
        "resource_pool.actor_rollout=[14]",
        "resource_pool.ref=[2]",
    ]
    folder = run(tmp_path / "run", 16, "tiny", overrides)
    shape = ModelConfig.from_folder(small_qwen)
    shard_bytes = 4 * sum(
        int(np.prod(local_shape(tensor, Shards(2)))) for tensor in param_table(shape)
    )
    for step in metrics(folder):
        assert step["publish/bytes"] == 6 * shard_bytes
        assert np.isfinite(step["loss"]) and step["grad_norm"] > 0


def test_rollout_of_the_next_minibatch_runs_while_one_is_trained(tiny, tmp_path):
    folder = run(
        tmp_path,
        4,
        "tiny",
        [
            *COMMON,
            "training.global_batch_size=16",
            "actor_rollout.max_running_samples=2",
        ],
    )
    recorded = spans(folder, 2)
    rollout = [(start, end) for rank, name, start, end in recorded if name == "rollout"]
    update = [(start, end) for rank, name, start, end in recorded if name == "update" and rank == 0]
    assert len(update) == 4
    first_update = min(update)
    assert any(start < first_update[1] and end > first_update[0] for start, end in rollout), (
        "no rollout span overlaps the first update"
    )
    assert max(end for _, end in rollout) > first_update[1], (
        "all samples were there before the first update ended"
    )
