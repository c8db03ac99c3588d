"""A world of one rank holds all roles; a size that it cannot cut a model by is told by its key."""

from __future__ import annotations

import pytest

from r1zero.preflight.checks import check
from r1zero.preflight.resolve import load_config

ALONE = "must be 1 in a world of one rank"
CP = "training.context_parallel_size"
EP = "actor_rollout.expert_model_parallel_size"
INFER_TP = "actor_rollout.infer_tensor_parallel_size"
REF_EP = "ref.expert_model_parallel_size"
LAYERS = "num_layer_list"
PP = "actor_rollout.pipeline_model_parallel_size"
TP = "actor_rollout.tensor_model_parallel_size"


@pytest.mark.parametrize(
    ("config", "overrides", "said"),
    [
        ("tiny", [], []),
        ("tiny_moe", [f"{EP}=1"], []),
        ("tiny_moe", [], [f"{EP}: 2 {ALONE}; start 4 processes or set it to 1"]),
        # the pool has no ranks for it, so that more processes are no way out
        ("tiny", [f"{CP}=2"], [f"{CP}: 2 {ALONE}; set it to 1"]),
        ("tiny", [f"{TP}=2", f"{INFER_TP}=1"], [f"{TP}: 2 {ALONE}; set it to 1"]),
        ("tiny_moe", [f"{EP}=1", f"{REF_EP}=2"], [f"{REF_EP}: 2 {ALONE}; set it to 1"]),
        (
            "tiny",
            [f"{PP}=2", f"actor_rollout.{LAYERS}=[1,1]", f"ref.{LAYERS}=[1,1]"],
            [
                f"{PP}: 2 {ALONE}",
                f"actor_rollout.{LAYERS}: [1, 1] must be left out in a world of one rank",
                f"ref.{LAYERS}: [1, 1] must be left out in a world of one rank",
            ],
        ),
        # without a reference nothing is said of its keys
        (
            "tiny",
            ["algorithm.kl_ctrl.kl_coef=0", "resource_pool.ref=[]", f"ref.{LAYERS}=[1,1]"],
            [],
        ),
    ],
)
def test_a_world_of_one_says_what_it_cannot_cut(
    config: str, overrides: list[str], said: list[str]
) -> None:
    cfg, _ = load_config(config, overrides)
    problems = check(cfg, world_size=1, absent_ok=True)
    assert len(problems) == len(said), problems
    for problem, beginning in zip(problems, said, strict=True):
        assert problem.startswith(beginning)
