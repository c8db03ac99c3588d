"""What the experts of a model demand of a layout: sizes that deal them out, sequence parallelism."""

from __future__ import annotations

import math
from collections.abc import Mapping

from r1zero.config.schema import Config
from r1zero.distributed.placement import RoleSize
from r1zero.errors import neighbours
from r1zero.models.config import ModelConfig

# The role that is cut so, and the section of its model.
EP_KEYS: Mapping[str, tuple[str, str]] = {
    "actor_rollout.expert_model_parallel_size": ("train", "actor_rollout"),
    "actor_rollout.infer_expert_parallel_size": ("rollout", "actor_rollout"),
    "ref.expert_model_parallel_size": ("ref", "ref"),
}
INFER_EP = "actor_rollout.infer_expert_parallel_size"
INFER_TP = "actor_rollout.infer_tensor_parallel_size"


def check_policy_experts(cfg: Config, shape: ModelConfig) -> list[str]:
    """The policy's in training and in rollout, but for EP, which needs to know of ranks, too."""
    if shape.experts is None:
        return []
    problems = []
    # each TP rank of an engine holds whole experts
    size = cfg.actor_rollout.infer_tensor_parallel_size or 1
    count = shape.experts.count
    if count % size:
        problems.append(
            f"{INFER_TP}: {size} does not divide the {count} experts of a layer of the model; "
            f"{neighbours(size, _divisors(count))}"
        )
    tp = cfg.actor_rollout.tensor_model_parallel_size
    if tp > 1 and not cfg.training.sequence_parallel:
        problems.append(
            "training.sequence_parallel: false does not go with experts and "
            f"actor_rollout.tensor_model_parallel_size {tp}, whose ranks would all send the same "
            "tokens to the experts; set it to true"
        )
    return problems


def check_dealing(
    key: str, size: int, shape: ModelConfig | None, ranks: int, whose: str = "of a pipeline stage"
) -> list[str]:
    """EP deals the experts of a layer to ranks, all of them equally many.

    Of 8 experts and 6 ranks, EP 2 gives each rank 4. `key` is what says EP, `whose` what the ranks are;
    without a shape the number of experts is not known.
    """
    if size == 1:
        return []
    dealt = [ranks]
    told = f"the {ranks} ranks {whose}"
    if shape is not None:
        if shape.experts is None:
            return [f"{key}: {size} deals experts out, but the model has none; 1 would work"]
        count = shape.experts.count
        dealt.append(count)
        told = f"the {count} experts of a layer and {told}"
    common = math.gcd(*dealt)
    if common % size == 0:
        return []
    return [f"{key}: {size} must divide {told}; {neighbours(size, _divisors(common))}"]


def check_whole_replicas(key: str, size: int, tp_key: str, tp: int) -> list[str]:
    """EP of rollout is of whole replicas: a multiple of their TP. The keys are what says them."""
    if size % tp == 0:
        return []
    return [
        f"{key}: {size} must be a multiple of {tp_key} {tp}, since each rank of a replica holds whole "
        f"experts; {neighbours(size, _multiples(tp, size))}"
    ]


def check_sharing(cfg: Config, size: RoleSize) -> list[str]:
    """Replicas of rollout that share experts: whole replicas, whose steps no graph can capture."""
    asked = cfg.actor_rollout.infer_expert_parallel_size
    if asked is None:
        return []
    if problems := check_whole_replicas(INFER_EP, asked, INFER_TP, size.tp):
        return problems
    if asked > size.tp and cfg.actor_rollout.decode_graphs:
        return [
            "actor_rollout.decode_graphs: true does not go with replicas that share experts "
            f"({INFER_EP} {asked} of {INFER_TP} {size.tp}), whose steps have other shapes whenever "
            "another replica has more to run; leave it out"
        ]
    return []


def _multiples(number: int, beyond: int) -> list[int]:
    return list(range(number, beyond + number + 1, number))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
