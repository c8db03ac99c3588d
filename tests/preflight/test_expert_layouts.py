"""Layouts that do not go with the experts of a model are refused."""

from __future__ import annotations

import pytest
from support.shapes import small_shape

from r1zero.models.config import Experts
from r1zero.preflight.experts import check_policy_experts, check_reference_experts
from r1zero.preflight.resolve import load_config

SHAPE = small_shape(experts=Experts(count=8, top_k=2, ffn_hidden_size=32, layers=(0, 1)))
TP = "actor_rollout.tensor_model_parallel_size"
INFER_TP = "actor_rollout.infer_tensor_parallel_size"
EP = "actor_rollout.expert_model_parallel_size"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([f"{EP}=4"], None),
        ([f"{EP}=3"], f"{EP}: 3 does not divide the 8 experts of a layer of the model; 2 and 4"),
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


def test_what_experts_demand_of_the_reference():
    ranks = ["resource_pool.ref=[3]", "ref.expert_model_parallel_size=3"]
    cfg, _ = load_config("tiny", ranks)
    [problem] = check_reference_experts(cfg, SHAPE)
    assert problem.startswith("ref.expert_model_parallel_size: 3 does not divide the 8 experts")
    [problem] = check_reference_experts(cfg, small_shape())
    assert "the model has none" in problem
