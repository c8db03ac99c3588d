"""ActorConfig: what the policy needs of the configuration. Imports no torch, for the checks."""

from __future__ import annotations

from dataclasses import dataclass

from r1zero.algo.objective import Objective, choose_objective
from r1zero.config.schema import ActorRollout, Algorithm, Config, KlCtrl


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """Adam, and the schedule of its learning rate over the updates of the run."""

    lr: float
    min_lr: float
    lr_decay_style: str
    warmup_updates: int
    total_updates: int
    weight_decay: float
    clip_grad: float  # limit of the global gradient norm; 0: off
    adam_beta1: float
    adam_beta2: float
    adam_eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorConfig:
    """How the policy learns from a global batch."""

    objective: Objective
    advantage_whiten: bool  # once more, over the tokens of a minibatch
    kl_penalty: str  # estimator
    kl_ctrl: KlCtrl
    entropy_coeff: float
    temperature: float  # of the log-probs, as in sampling
    ppo_epochs: int
    micro_batch_size: int  # in samples
    max_tokens_per_microbatch: int | None  # if given, instead
    optimizer: OptimizerConfig


def actor_config(cfg: Config, total_updates: int) -> ActorConfig:
    """Take what the policy needs; `total_updates` are those of the whole run."""
    actor = cfg.actor_rollout
    algorithm = cfg.algorithm
    warmup = actor.lr_warmup_iters or round(total_updates * (actor.lr_warmup_fraction or 0.0))
    optimizer = OptimizerConfig(
        lr=actor.lr,
        min_lr=actor.min_lr,
        lr_decay_style=actor.lr_decay_style,
        warmup_updates=warmup,
        total_updates=total_updates,
        weight_decay=actor.weight_decay,
        clip_grad=actor.clip_grad,
        adam_beta1=actor.adam_beta1,
        adam_beta2=actor.adam_beta2,
        adam_eps=actor.adam_eps,
    )
    return ActorConfig(
        objective=objective_of(algorithm, actor),
        advantage_whiten=algorithm.advantage_whiten,
        kl_penalty=algorithm.kl_penalty,
        kl_ctrl=algorithm.kl_ctrl,
        entropy_coeff=actor.entropy_coeff,
        temperature=actor.temperature,
        ppo_epochs=actor.ppo_epochs,
        micro_batch_size=actor.micro_batch_size,
        max_tokens_per_microbatch=actor.max_tokens_per_microbatch,
        optimizer=optimizer,
    )


def objective_of(algorithm: Algorithm, actor: ActorRollout) -> Objective:
    """Look up loss, aggregation and advantage. BadInput, naming the key, for what does not fit."""
    if actor.clip_ratio_low is None:
        low = actor.clip_ratio
    else:
        low = actor.clip_ratio_low
    if actor.clip_ratio_high is None:
        high = actor.clip_ratio
    else:
        high = actor.clip_ratio_high
    return choose_objective(
        algorithm.loss,
        algorithm.loss_settings,
        {"clip_low": low, "clip_high": high},
        algorithm.aggregation,
        algorithm.advantage or algorithm.adv_estimator,
    )
