"""RewardConfig: what the reward executor needs of the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

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
    # Of data sets with reward functions of their own, by where a prompt is from: names, with weights.
    of_sources: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    settings: FunctionSettings = field(default_factory=dict)
    workers: int = _DEFAULTS.workers  # processes
    deadline_seconds: float = _DEFAULTS.deadline_seconds  # of one call
    worker_memory_megabytes: int = _DEFAULTS.worker_memory_megabytes  # that a worker may grow by

    @property
    def of_worker(self) -> Setup:
        """What a worker needs to know of it."""
        return Setup(
            self.functions, self.settings, self.deadline_seconds, self.worker_memory_megabytes
        )

    @property
    def functions(self) -> list[str]:
        """All reward functions, each once: those of the run, then others of data sets."""
        return list(dict.fromkeys([*self.names, *chain.from_iterable(self.of_sources.values())]))

    def weights_of(self, source: str) -> Mapping[str, float]:
        """The reward functions, with weights, for prompts from there."""
        if source in self.of_sources:
            return self.of_sources[source]
        return dict(zip(self.names, self.weights, strict=True))


def reward_config(
    algorithm: Algorithm,
    reward: Reward,
    of_sources: Mapping[str, Mapping[str, float]] | None = None,
) -> RewardConfig:
    """Take what concerns the reward functions; `of_sources` as in RewardConfig."""
    usual = dict(zip(algorithm.verifier_function, algorithm.verifier_weight, strict=True))
    own = {name: scorers for name, scorers in (of_sources or {}).items() if scorers != usual}
    return RewardConfig(
        names=algorithm.verifier_function,
        weights=algorithm.verifier_weight,
        of_sources=own,
        settings=reward.settings,
        workers=reward.workers,
        deadline_seconds=reward.deadline_seconds,
        worker_memory_megabytes=reward.worker_memory_megabytes,
    )
