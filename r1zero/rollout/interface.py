"""Rollout engine interface: requests in, groups of samples out, weights written in place.

The step knows engines by `RolloutEngine` alone. An engine is one file with a class that has a
`layout` and a `build` (`EngineKind`), and a line in engines.py; docs/extending.md has an example.

Needs no torch, like every check of a configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from r1zero.models.config import ModelConfig
from r1zero.models.layout import WeightLayout, WeightTarget
from r1zero.types import Batch, Group, Part

if TYPE_CHECKING:
    import torch

    from r1zero.distributed.groups import Grid


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. `top_k` 0 and `top_p` 1 mean the whole distribution."""

    temperature: float
    top_p: float
    top_k: int
    seed: int


@dataclass(frozen=True, slots=True)
class RolloutProgress:
    """How far the request under way is, on this replica."""

    done: int  # samples that are finished
    total: int  # samples that were asked for
    longest: int  # tokens of the longest sample that runs
    tokens: int  # response tokens drawn so far, over all samples


def _ignore_sample(group: Group, member: int) -> None:
    pass


def _ignore_step() -> None:
    pass


@dataclass(frozen=True, slots=True)
class EngineListener:
    """What somebody wants to be told while an engine generates, to work meanwhile.

    Either must return soon: generation waits for it.
    """

    on_sample: Callable[[Group, int], None] = _ignore_sample  # this member of a group is finished
    on_step: Callable[[], None] = _ignore_step  # every running sample has one token more


class RolloutEngine(Protocol):
    """The engine of one replica. Every rank of the replica calls it alike, and returns the same."""

    version: int  # of the weights that were committed last; it signs every sample
    listeners: list[EngineListener]  # told in this order

    def submit(
        self,
        batch: Batch,
        positions: Sequence[int],
        sampling: Sampling,
        budgets: np.ndarray | None = None,
    ) -> None:
        """Take a request: all samples of the prompts at these positions of the batch.

        A sample has at most `EngineConfig.max_response` tokens; `budgets`, int [P, G], sets lower
        limits for each. The uniform number of a token is that of `sampler.uniforms`, by
        `batch.random_key`. The request
        before must have been collected whole.
        """

    def collect(self, part: Part) -> list[Group]:
        """Generate until the requested groups of a part are complete and no other can belong to it;
        return them in order of position.

        Parts come in the order of the batch: those of longer responses after those of shorter ones
        at the same positions. Every sample has tokens, log-probs (of the whole distribution at the sampling temperature),
        `truncated`, `version` and `loss_mask`. Of a model with experts it also has `routes`, and its
        group `prompt_routes`, if the batch wants them (`keeps_routes`); each row holds different
        experts. An engine of the user's whose routes are otherwise ends the run (route_check.py).
        """

    def progress(self) -> RolloutProgress:
        """How far the request under way is; after it, what it took."""

    def weights(self) -> WeightTarget:
        """Where publishing writes this rank's weights, the same tensors every time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the user decides about an engine."""

    name: str  # in the table of engines, or module:class
    max_length: int  # tokens of a prompt and its response
    max_response: int  # tokens of a response
    max_cache_tokens: int  # in the KV cache of a replica
    max_running: int | None  # samples decoded together; None: as many as the cache can hold
    graphs: bool | None  # capture decoding steps; None: if the device is an NPU


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """What an engine is built from."""

    model_folder: Path  # config.json and tokenizer; its weights are not the ones to generate with
    shape: ModelConfig
    grid: Grid  # this rank's place in the rollout role, and its process groups
    dtype: torch.dtype  # of the weights
    device: torch.device
    end_ids: tuple[int, ...]  # tokens that end a response, and belong to it
    unused: Sequence[range]  # rows of the vocabulary that are no tokens: never drawn
    config: EngineConfig


class EngineKind(Protocol):
    """A class of engines, as the table of engines holds it.

    One whose samples have `routes` says so by `keeps_routes = True`; without it none are replayed.
    """

    layout: WeightLayout

    def build(self, setup: EngineSetup) -> RolloutEngine:
        """Make an engine without weights. Called on all rollout ranks together.

        BadInput for what it cannot do.
        """


class IdleEngine:
    """The engine of a rank that does not generate: takes every request, and has no samples."""

    def __init__(self, layout: WeightLayout) -> None:
        self.version = -1
        self.listeners: list[EngineListener] = []
        self._target = WeightTarget(layout, {}, self._commit)

    def submit(
        self,
        batch: Batch,
        positions: Sequence[int],
        sampling: Sampling,
        budgets: np.ndarray | None = None,
    ) -> None:
        assert not positions, "a rank that does not generate has no share of a batch"

    def collect(self, part: Part) -> list[Group]:
        return []

    def progress(self) -> RolloutProgress:
        return RolloutProgress(0, 0, 0, 0)

    def weights(self) -> WeightTarget:
        return self._target

    def _commit(self, version: int) -> None:
        raise AssertionError("no weights are published to a rank that does not generate")
