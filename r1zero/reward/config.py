"""RewardConfig: what the reward executor needs of the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from r1zero.config.schema import Algorithm, Reward
from r1zero.reward.types import FunctionSettings
from r1zero.reward.worker import Setup

_DEFAULTS = Reward()


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """Which reward functions score the responses, and within which bounds they run.

    The defaults of the bounds are those of the configuration.
    """

    names: Sequence[str]  # of reward functions, as configured
    weights: Sequence[float]  # one for each; the reward is their weighted sum
    settings: FunctionSettings = field(default_factory=dict)
    workers: int = _DEFAULTS.workers  # processes
    deadline_seconds: float = _DEFAULTS.deadline_seconds  # of one call
    worker_memory_megabytes: int = _DEFAULTS.worker_memory_megabytes  # that a worker may grow by

    @property
    def of_worker(self) -> Setup:
        """What a worker needs to know of it."""
        return Setup(self.names, self.settings, self.deadline_seconds, self.worker_memory_megabytes)


def reward_config(algorithm: Algorithm, reward: Reward) -> RewardConfig:
    """Take what concerns the reward functions."""
    return RewardConfig(
        names=algorithm.verifier_function,
        weights=algorithm.verifier_weight,
        settings=reward.settings,
        workers=reward.workers,
        deadline_seconds=reward.deadline_seconds,
        worker_memory_megabytes=reward.worker_memory_megabytes,
    )
