"""ActorConfig: what the policy needs of the configuration. Imports no torch, for the checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from r1zero.algo.losses import LOSSES
from r1zero.algo.objective import Objective, choose_objective
from r1zero.algo.whitening import Whitening
from r1zero.config.legacy import LOSS_SETTINGS
from r1zero.config.schema import (
    ADVANTAGE,
    ActorRollout,
    Algorithm,
    Config,
    Correction,
    EntropyCtrl,
    KlCtrl,
)
from r1zero.errors import Diagnostics

CLIP_RATIO = 0.2  # where no key gives a bound


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
    offload: bool  # its state lies on the host between updates


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorConfig:
    """How the policy learns from a global batch."""

    objective: Objective
    whitens: Whitening | None  # the advantages, over the samples of an update
    score_weights: tuple[float, ...]  # of the reward functions
    kl_penalty: str  # estimator
    kl_in: str  # "loss", or the "reward" of each token
    kl_ctrl: KlCtrl
    base_is_reference: bool  # the model below the adapters is the KL term's reference
    entropy_coeff: float  # of the first step, if it is steered
    entropy_ctrl: EntropyCtrl
    response_budget: int  # tokens that a response may have
    temperature: float  # of the log-probs, as in sampling
    old_logprobs: str  # "recompute" by the trainer, or those of the "rollout" engine
    correction: Correction  # of the mismatch with the rollout engine
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
        offload=cfg.training.optimizer_offload,
    )
    objective = objective_of(algorithm, actor)
    whitens = objective.advantage.whitens
    if algorithm.advantage_whiten:
        whitens = "tokens"
    return ActorConfig(
        objective=objective,
        whitens=whitens,
        score_weights=tuple(cfg.score_weights),
        kl_penalty=algorithm.kl_penalty,
        kl_in=algorithm.kl_in,
        kl_ctrl=algorithm.kl_ctrl,
        base_is_reference=cfg.base_is_reference,
        entropy_coeff=actor.entropy_coeff,
        entropy_ctrl=algorithm.entropy_ctrl,
        response_budget=cfg.response_budget,
        temperature=actor.temperature,
        old_logprobs=algorithm.old_logprobs,
        correction=algorithm.correction,
        ppo_epochs=actor.ppo_epochs,
        micro_batch_size=actor.micro_batch_size,
        max_tokens_per_microbatch=actor.max_tokens_per_microbatch,
        optimizer=optimizer,
    )


def objective_of(algorithm: Algorithm, actor: ActorRollout) -> Objective:
    """Look up loss, aggregation and advantage. BadInput, naming the key, for what does not fit."""
    inherited = dict.fromkeys(LOSS_SETTINGS, CLIP_RATIO)
    for setting, keys in LOSS_SETTINGS.items():
        key = _first_given(actor, keys)
        if key is not None:
            inherited[setting] = getattr(actor, key)
    return choose_objective(
        algorithm.loss,
        algorithm.loss_settings,
        inherited,
        algorithm.aggregation,
        algorithm.advantage or algorithm.adv_estimator or ADVANTAGE,
        algorithm.advantage_settings,
    )


def unread_by_loss(algorithm: Algorithm, actor: ActorRollout) -> list[str]:
    """A warning for the keys of LOSS_SETTINGS that are given though the chosen loss reads others."""
    loss = LOSSES[algorithm.loss]
    read: dict[str, str | None] = {}  # by setting, the key that it comes from
    for setting, keys in LOSS_SETTINGS.items():
        if loss.inherits(setting) and setting not in algorithm.loss_settings:
            read[setting] = _first_given(actor, keys)
    values_read = [getattr(actor, key) for key in read.values() if key is not None]
    notes = Diagnostics()
    for key in ("clip_ratio", "clip_ratio_low", "clip_ratio_high"):
        value = getattr(actor, key)
        if value is None or key in read.values():
            continue
        if not any(key in LOSS_SETTINGS[setting] for setting in read):
            reason = f"the loss {algorithm.loss} takes its bounds from algorithm.loss_settings"
            notes.ignore(f"actor_rollout.{key}", reason)
        elif value not in values_read:
            notes.ignore(f"actor_rollout.{key}", "clip_ratio_low and clip_ratio_high say it")
    return notes.warnings


def unsummed_terms(algorithm: Algorithm, actor: ActorRollout) -> list[str]:
    """A warning where skipped groups would have been learnt from, for want of an advantage by the
    other terms of the loss alone."""
    if algorithm.equal_groups != "skip":
        return []
    entropy_coeff = actor.entropy_coeff
    if algorithm.entropy_ctrl.type == "adaptive":
        entropy_coeff = algorithm.entropy_ctrl.max  # it may come to that
    terms = {
        "the KL (algorithm.kl_ctrl.kl_coef)": algorithm.kl_ctrl.kl_coef,
        "the entropy bonus (actor_rollout.entropy_coeff)": entropy_coeff,
    }
    return [
        f"algorithm.equal_groups: skip leaves {term} of skipped groups out of the loss, though its "
        f"coefficient is {coefficient:g}; the gradient is that of keep with a coefficient of 0"
        for term, coefficient in terms.items()
        if coefficient
    ]


def _first_given(actor: ActorRollout, keys: Sequence[str]) -> str | None:
    return next((key for key in keys if getattr(actor, key) is not None), None)
