"""What a checkpoint is taken of, and brought back to: a rank's part of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from r1zero.checkpoint.config import CheckpointConfig
from r1zero.checkpoint.progress import TrainerState
from r1zero.data.batches import BatchPlanner
from r1zero.data.ends import Ends
from r1zero.distributed.groups import World
from r1zero.distributed.transfer import RoleTransfer
from r1zero.models.config import ModelConfig
from r1zero.policy.idle import AnyActor, AnyReference
from r1zero.run_folder.claim import Hold
from r1zero.types import Batch, Group


class RunState(Protocol):
    """The state of a run on one rank."""

    checkpoint_config: CheckpointConfig
    world: World
    move: RoleTransfer
    shape: ModelConfig
    ends: Ends  # of a response
    policy: AnyActor  # train
    reference: AnyReference  # ref
    progress: TrainerState
    batches: dict[int, Batch]  # drawn and not yet learnt from, by the step that does
    # those of a checkpoint, with the groups of this rank's rollout replica
    restored: list[tuple[Batch, list[Group]]]
    planner: BatchPlanner | None  # controller
    hold: Hold  # on the run's folders; empty but on the controller
    folder: Path  # the run folder, and that of its checkpoints, by the paths to write by: Hold.way
    checkpoints: Path

    @property
    def has_reference(self) -> bool:
        """There are reference log-probs, of ref ranks or of the model below adapters."""

    def groups_in_flight(self) -> list[Group]:
        """What this rank's rollout replica drew for those batches, on its output rank."""
