"""Where a run is between two steps: what trainer.json in a checkpoint holds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1zero.distributed.placement import RankGrid
from r1zero.errors import BadInput
from r1zero.types import Drawn

NAME = "trainer.json"


@dataclass(slots=True)
class TrainerState:
    """The position of a run, equal on all ranks. Everything else that a step needs follows from it
    and the tensors."""

    step: int = 0  # the last one that was finished
    # of the weights that draw the next step; counted where they are published
    weights_version: int = 0
    # of those that the reference holds: 0, what it was loaded with, until it is reset
    reference_version: int = 0
    prompts_drawn: int = 0  # from the stream of prompts: the data cursor
    # groups that the last step drew, and how many of them it kept: the next one draws accordingly
    groups_drawn: int = 0
    groups_kept: int = 0
    evaluation: dict[str, float] | None = None  # held-out metrics of the start weights
    scores: dict[str, float] | None = None  # those after the last step, if it was evaluated

    def advance(self, drawn: Drawn) -> None:
        """A step is finished, which drew so much."""
        self.step += 1
        self.prompts_drawn += drawn.prompts
        self.groups_drawn = drawn.groups
        self.groups_kept = drawn.kept
        self.scores = None

    def has_reached(self, stop_at: Mapping[str, float]) -> bool:
        """Whether the last step was evaluated, and with all of these scores or better ones."""
        if not stop_at or self.scores is None:
            return False
        return all(self.scores.get(key, -math.inf) >= value for key, value in stop_at.items())

    def is_trained(self, total_steps: int, stop_at: Mapping[str, float]) -> bool:
        """Whether no step is left to take."""
        return self.step >= total_steps or self.has_reached(stop_at)


def layout_of(grid: RankGrid) -> dict[str, int]:
    """The axes of a role by name. Those that older checkpoints do not know only where they cut."""
    layout = {"tp": grid.tp, "pp": grid.pp, "dp": grid.dp}
    for axis, size in (("cp", grid.cp), ("ep", grid.ep)):
        if size > 1:
            layout[axis] = size
    return layout


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A checkpoint in words: the run's progress, and what it was saved from."""

    progress: TrainerState
    updates: int  # optimizer steps so far: where the learning-rate schedule stands
    # None if it was fixed; older checkpoints have its value then, too
    kl_coefficient: float | None
    shape: dict[str, Any]  # of the model, as ModelConfig's fields
    dtype: str
    layout: dict[str, int]  # of train: see layout_of
    # folders of the start weights, by role: what the reference is until it is first reset; from then
    # on the checkpoint holds it (checkpoint/reference_state.py)
    start: dict[str, str]
    # Of the entropy bonus, and whether it applies; None if it was fixed, or in checkpoints that are
    # older than it.
    entropy_coefficient: float | None = None
    entropy_applies: bool = True
    versions: dict[str, str] = field(default_factory=dict)
    # rank, alpha and targets of adapters, which the checkpoint holds in place of the model's weights
    lora: dict[str, Any] | None = None
    # plan of a batch that is drawn and not yet learnt from (checkpoint/in_flight.py)
    in_flight: dict[str, Any] | None = None

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> CheckpointInfo:
        """Read a checkpoint's trainer.json. BadInput when it is missing or damaged."""
        try:
            content = json.loads((folder / NAME).read_text())
            return cls(**content | {"progress": TrainerState(**content["progress"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{folder / NAME} cannot be read ({error})") from None
