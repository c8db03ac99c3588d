"""What the experts of a model demand of a layout: sizes that deal them out, sequence parallelism."""

from __future__ import annotations

from operator import attrgetter

from r1zero.config.schema import Config
from r1zero.errors import neighbours
from r1zero.models.config import ModelConfig


def check_policy_experts(cfg: Config, shape: ModelConfig) -> list[str]:
    """The policy's in training and in rollout."""
    problems = _check_size(cfg, "actor_rollout.expert_model_parallel_size", shape)
    if shape.experts is None:
        return problems
    # each TP rank of an engine holds whole experts
    problems += _check_size(cfg, "actor_rollout.infer_tensor_parallel_size", shape)
    tp = cfg.actor_rollout.tensor_model_parallel_size
    if tp > 1 and not cfg.training.sequence_parallel:
        problems.append(
            "training.sequence_parallel: false does not go with experts and "
            f"actor_rollout.tensor_model_parallel_size {tp}, whose ranks would all send the same "
            "tokens to the experts; set it to true"
        )
    return problems


def check_reference_experts(cfg: Config, shape: ModelConfig) -> list[str]:
    """The reference's."""
    return _check_size(cfg, "ref.expert_model_parallel_size", shape)


def _check_size(cfg: Config, key: str, shape: ModelConfig) -> list[str]:
    """Ranks that share the experts of a layer have equally many."""
    size = attrgetter(key)(cfg)
    if shape.experts is None:
        if size == 1:
            return []
        return [f"{key}: {size} deals experts out, but the model has none; 1 would work"]
    count = shape.experts.count
    if count % size == 0:
        return []
    works = [number for number in range(1, count + 1) if count % number == 0]
    return [
        f"{key}: {size} does not divide the {count} experts of a layer of the model; "
        f"{neighbours(size, works)}"
    ]
