"""The resolved run: what a configuration means on this machine, decided once.

    load_config   the text of the configuration, and what the environment fills in    -> Config
    look          models and placement, as far as they are here                       -> Found
    check         a sentence for everything that is wrong with them
    complete      nothing is missing any more                                         -> Run

Whatever is built later is built from the Run, and each component takes its own small part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1zero.checkpoint.config import CheckpointConfig
from r1zero.checkpoint.retention import Retention
from r1zero.config.load import dump
from r1zero.config.schema import Config, filled
from r1zero.data.sources import DataSource, eval_sources, train_sources
from r1zero.data.template import Template
from r1zero.distributed.placement import Placement
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.dtype import Dtype
from r1zero.models.lora import LoraConfig, lora_config
from r1zero.policy.actor_config import ActorConfig, actor_config, unread_by_loss, unsummed_terms
from r1zero.preflight.cautions import cautions, node_cautions
from r1zero.preflight.checks import check_found
from r1zero.preflight.datasets import keeping, templates_of
from r1zero.preflight.found import Found, ModelFound, dtype_of, look
from r1zero.preflight.replay import replay_cautions, replays_routes
from r1zero.preflight.reward_model import reward_model_cautions
from r1zero.reward.config import RewardConfig, reward_config
from r1zero.rollout.interface import EngineConfig, Sampling
from r1zero.run_folder.exported import MODEL


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model on disk."""

    load: str  # its weights: a Hugging Face folder or a Megatron checkpoint
    folder: Path  # that holds config.json
    shape: ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run, resolved. It need not evaluate (then `eval_data` is empty), nor have a reference."""

    config: Config
    placement: Placement
    node_of_rank: tuple[int, ...]
    actor: ModelFiles
    reference: ModelFiles | None
    reward_model: ModelFiles | None
    dtype: Dtype
    templates: Mapping[str, Template]  # of all data sets, by name
    tokenizer: str  # folder
    train_data: tuple[DataSource, ...]
    eval_data: tuple[DataSource, ...]
    output_dir: Path  # the run folder
    checkpoints: Path  # the folder of its checkpoints
    warnings: tuple[str, ...]

    @property
    def reference_shape(self) -> ModelConfig | None:
        """None when the run has no reference."""
        return None if self.reference is None else self.reference.shape

    @property
    def reward_shape(self) -> ModelConfig | None:
        """None when the run has no reward model."""
        return None if self.reward_model is None else self.reward_model.shape

    @property
    def total_updates(self) -> int:
        """Optimizer steps from the first step to the last."""
        return self.config.training.train_iters * self.config.updates_per_step

    @property
    def actor_config(self) -> ActorConfig:
        """What the policy needs."""
        return actor_config(self.config, self.total_updates)

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters that learn in place of the weights, if they do."""
        return lora_config(self.config.actor_rollout)

    @property
    def reward_config(self) -> RewardConfig:
        """What the reward executor needs."""
        sources = (*self.train_data, *self.eval_data)
        of_sources = {source.label: source.scorers for source in sources}
        return reward_config(self.config.algorithm, self.config.reward, of_sources)

    @property
    def engine_config(self) -> EngineConfig:
        """What the rollout engine needs."""
        actor = self.config.actor_rollout
        return EngineConfig(
            name=actor.engine,
            max_length=self.config.training.seq_length,
            max_response=self.config.response_budget,
            max_cache_tokens=actor.max_tokens_to_oom,
            max_running=actor.max_running_samples,
            graphs=actor.decode_graphs,
        )

    @property
    def replays_routes(self) -> bool:
        """Routers of the trainer repeat what those of the rollout engine chose."""
        return replays_routes(self.config, self.actor.shape)

    @property
    def sampling(self) -> Sampling:
        """How the samples to train on are drawn."""
        actor = self.config.actor_rollout
        seed = self.config.training.seed
        return Sampling(actor.temperature, actor.top_p, max(actor.top_k, 0), seed)

    @property
    def checkpoint_config(self) -> CheckpointConfig:
        """What saving, restoring and the export of the model need."""
        training = self.config.training
        return CheckpointConfig(
            run_name=self.config.name,
            folder=self.checkpoints,
            # that of a reference too where there is none: a later run of this one may have one
            start={"actor_rollout": self.actor.load, "ref": filled(self.config.ref.load)},
            total_steps=training.train_iters,
            save_interval=training.save_interval,
            async_save=training.async_save,
            retention=Retention(
                keep_last=training.keep_last,
                keep_every=training.keep_every,
                keep_best=training.keep_best,
                best_score=training.best_score or "",
            ),
            export_interval=training.export_interval,
            stop_at=training.stop_at,
            stop_on_failure=training.on_save_failure == "stop",
            config_text=dump(self.config),
            kl_control=self.config.algorithm.kl_ctrl.type,
            model=self.output_dir / MODEL,
            model_source=self.actor.folder,
            model_dtype=self.dtype.full_name,
            lora=self.lora,
        )


def resolve(
    cfg: Config,
    warnings: Sequence[str] = (),
    world_size: int | None = None,
    node_of_rank: Sequence[int] | None = None,
) -> Run:
    """Look, check and complete. BadInput with a sentence for everything that is wrong."""
    found = look(cfg, world_size, node_of_rank)
    problems = check_found(found)
    if problems:
        raise BadInput("\n".join(problems))
    return complete(found, warnings)


def complete(found: Found, warnings: Sequence[str] = ()) -> Run:
    """Make a run of what was found and checked."""
    cfg = found.config
    assert found.placement is not None, "checked before"
    train_data = tuple(train_sources(cfg, keeping(cfg)))
    eval_data = tuple(eval_sources(cfg, keeping(cfg)))
    templates_file = filled(cfg.training.prompt_type_path)
    templates, wrong = templates_of([*train_data, *eval_data], templates_file)
    assert not wrong, "checked before"
    return Run(
        config=cfg,
        placement=found.placement,
        node_of_rank=found.node_of_rank,
        actor=_complete_model(found.actor),
        reference=None if found.reference is None else _complete_model(found.reference),
        reward_model=None if found.reward_model is None else _complete_model(found.reward_model),
        dtype=dtype_of(cfg),
        templates=templates,
        tokenizer=filled(cfg.training.tokenizer_name_or_path),
        train_data=train_data,
        eval_data=eval_data,
        output_dir=Path(cfg.output_dir),
        checkpoints=cfg.checkpoints,
        warnings=(
            *warnings,
            *unread_by_loss(cfg.algorithm, cfg.actor_rollout),
            *unsummed_terms(cfg.algorithm, cfg.actor_rollout),
            *cautions(cfg),
            *node_cautions(found),
            *reward_model_cautions(found),
            *replay_cautions(cfg, found.actor.shape),
        ),
    )


def _complete_model(found: ModelFound) -> ModelFiles:
    assert found.shape is not None, "checked before"
    return ModelFiles(load=found.load, folder=found.folder, shape=found.shape)
