"""Layouts that do not go with the experts of a model are refused."""

from __future__ import annotations

import pytest
from support.shapes import small_shape

from r1zero.config.schema import role_sizes
from r1zero.models.config import Experts
from r1zero.preflight.checks import check
from r1zero.preflight.experts import EP_KEYS, check_dealing, check_policy_experts, check_sharing
from r1zero.preflight.resolve import load_config

SHAPE = small_shape(experts=Experts(count=8, top_k=2, ffn_hidden_size=32, layers=(0, 1)))
TP = "actor_rollout.tensor_model_parallel_size"
INFER_TP = "actor_rollout.infer_tensor_parallel_size"
EP = "actor_rollout.expert_model_parallel_size"
INFER_EP = "actor_rollout.infer_expert_parallel_size"
GRAPHS = "actor_rollout.decode_graphs"
PP = "actor_rollout.pipeline_model_parallel_size"
LAYERS = "num_layer_list"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([f"{INFER_TP}=16"], f"{INFER_TP}: 16 does not divide the 8 experts"),
        ([f"{TP}=2"], "training.sequence_parallel: false does not go with experts"),
        ([f"{TP}=2", "training.sequence_parallel=true"], None),
    ],
)
def test_what_experts_demand_of_the_policy(overrides, said):
    ranks = ["actor_rollout.num_gpus_for_train=48", "actor_rollout.num_gpus_for_infer=16"]
    cfg, _ = load_config("tiny", [*ranks, "resource_pool.actor_rollout=[64]", *overrides])
    problems = check_policy_experts(cfg, SHAPE)
    assert bool(problems) == (said is not None)
    assert all(problem.startswith(said) for problem in problems)


@pytest.mark.parametrize(
    ("ep", "shape", "stage", "said"),
    [
        (4, SHAPE, 12, None),
        (
            3,
            SHAPE,
            2,
            "3 must divide the 8 experts of a layer and the 2 ranks of a pipeline stage; 2 w",
        ),
        (
            3,
            SHAPE,
            12,
            "3 must divide the 8 experts of a layer and the 12 ranks of a pipeline stage; 2 and 4 are",
        ),
        (8, None, 4, "8 must divide the 4 ranks of a pipeline stage; 4 would work"),
        (3, small_shape(), 3, "3 deals experts out, but the model has none; 1 would work"),
    ],
)
def test_each_rank_of_a_stage_gets_as_many_experts(ep, shape, stage, said):
    for key in EP_KEYS:
        problems = check_dealing(key, ep, shape, stage)
        assert bool(problems) == (said is not None)
        assert all(problem.startswith(f"{key}: {said}") for problem in problems)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([f"{INFER_EP}=4", f"{INFER_TP}=2"], None),
        ([f"{INFER_EP}=6", f"{INFER_TP}=4"], f"{INFER_EP}: 6 must be a multiple of {INFER_TP} 4"),
        ([f"{INFER_EP}=1", f"{INFER_TP}=2"], f"{INFER_EP}: 1 must be a multiple of {INFER_TP} 2"),
        ([f"{INFER_EP}=2", f"{INFER_TP}=2", f"{GRAPHS}=true"], None),
        ([f"{INFER_EP}=4", f"{INFER_TP}=2", f"{GRAPHS}=true"], f"{GRAPHS}: true does not go with"),
    ],
)
def test_replicas_that_share_experts_are_whole_and_run_without_graphs(overrides, said):
    ranks = ["actor_rollout.num_gpus_for_infer=48", "resource_pool.actor_rollout=[49]"]
    cfg, _ = load_config("tiny", [*ranks, *overrides])
    problems = check_sharing(cfg, role_sizes(cfg)["rollout"])
    assert bool(problems) == (said is not None)
    assert all(problem.startswith(said) for problem in problems)


@pytest.mark.parametrize(
    ("config", "overrides", "said"),
    [
        (
            "tiny_moe",
            [f"{EP}=3"],
            f"{EP}: 3 must divide the ",  # of experts, too, where the model has been made
        ),
        (
            "qwen3_30b_a3b",
            [f"{PP}=4"],
            f"{EP}: 8 must divide the 128 experts of a layer and the 4 ranks of a pipeline stage; 4 w",
        ),
        (
            "qwen3_30b_a3b",
            [f"{INFER_EP}=6"],
            f"{INFER_EP}: 6 must divide the 128 experts of a layer and the 8 ranks of rollout",
        ),
        (
            "qwen3_30b_a3b",
            [f"{INFER_EP}=2"],
            f"{INFER_EP}: 2 must be a multiple of {INFER_TP} 4, since each rank of a replica holds "
            "whole experts; 4 would work",
        ),
        (
            "tiny",
            [f"actor_rollout.{LAYERS}=[1,1]"],
            f"actor_rollout.{LAYERS}: [1, 1] must have a number for each pipeline stage",
        ),
        (
            "tiny",
            [f"ref.{LAYERS}=[1,1]"],
            f"ref.{LAYERS}: [1, 1] must have a number for each pipeline stage",
        ),
    ],
)
def test_a_layout_is_told_once_and_by_its_key(config, overrides, said):
    cfg, _ = load_config(config, overrides)
    [problem] = check(cfg, absent_ok=True)
    assert problem.startswith(said)
