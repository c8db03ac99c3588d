"""CheckpointConfig: what checkpoints and the export of the model need of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from r1zero.checkpoint.progress import TrainerState
from r1zero.checkpoint.retention import Retention
from r1zero.models.lora import LoraConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When state is saved, where, and what is kept beside it."""

    run_name: str
    folder: Path  # of the checkpoints, as the user calls it
    start: Mapping[str, str]  # weights that training and its reference began with, by section
    total_steps: int
    save_interval: int | None  # in steps; None: only when the run leaves early
    async_save: bool
    retention: Retention
    export_interval: int | None  # in steps, of models on the way
    stop_at: Mapping[str, float]  # scores that end the training
    stop_on_failure: bool  # else training goes on when a save fails
    config_text: str  # the whole configuration, kept beside the state
    kl_control: str  # fixed or adaptive
    model: Path  # where the trained model goes, as the user calls it
    model_source: Path  # whose config.json and tokenizer go beside it
    model_dtype: str  # bfloat16 or float32
    lora: LoraConfig | None  # of the adapters, if they learn in place of the weights

    def is_trained(self, progress: TrainerState) -> bool:
        """Whether no step is left to take."""
        return progress.is_trained(self.total_steps, self.stop_at)
