"""Keys that are set and that nothing reads, because of what other keys chose: a warning for each.

A value that says what holds anyway is not worth a word. Keys that never have an effect are in
legacy.py; those that the policy loss does not read are told by policy/actor_config.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from r1zero.config.schema import LINEARS, Config
from r1zero.errors import Diagnostics

# Keys of the section reward that reward functions read; `verifier` is refused without a reward model.
OF_RULES = (
    "verifier",
    "settings",
    "workers",
    "deadline_seconds",
    "worker_memory_megabytes",
    "max_failure_rate",
)
Unread = Iterator[tuple[str, str]]  # key, and why nothing reads it


def note_unread(cfg: Config, notes: Diagnostics) -> None:
    """Note what has no effect in a configuration as it was written, before defaults that follow from
    other keys are filled in."""
    for rule in RULES:
        for key, reason in rule(cfg):
            notes.ignore(key, reason)


def _is_set(section: Any, key: str) -> bool:
    """Whether a key has another value than its default."""
    [default] = [entry.default for entry in fields(section) if entry.name == key]
    return getattr(section, key) != default


def _advantage(cfg: Config) -> Unread:
    algorithm = cfg.algorithm
    if algorithm.advantage is None or algorithm.adv_estimator in (None, algorithm.advantage):
        return
    yield "algorithm.adv_estimator", f"algorithm.advantage says {algorithm.advantage}"


def _kl(cfg: Config) -> Unread:
    control = cfg.algorithm.kl_ctrl
    if control.type == "fixed":
        for key in ("target_kl", "horizon"):
            if _is_set(control, key):
                yield f"algorithm.kl_ctrl.{key}", "type fixed keeps kl_coef; adaptive steers it"
    elif control.kl_coef == 0:
        reason = "adaptive multiplies kl_coef, and 0 stays 0"
        for key in ("type", "target_kl", "horizon"):
            yield f"algorithm.kl_ctrl.{key}", reason


def _reference(cfg: Config) -> Unread:
    if cfg.has_reference:
        return
    reason = "kl_coef is 0 and resource_pool.ref names no ranks, so there is no reference"
    if cfg.base_is_reference:
        reason = "the reference is the model below the adapters, on the train ranks"
    else:
        for key in ("kl_in", "kl_penalty"):
            if _is_set(cfg.algorithm, key):
                yield f"algorithm.{key}", reason
    for entry in fields(cfg.ref):
        # model and load are filled in, and stand in every configuration that a run wrote down; the
        # last one is refused
        if entry.name not in ("model", "load", "reset_interval") and _is_set(cfg.ref, entry.name):
            yield f"ref.{entry.name}", reason


def _reward_model(cfg: Config) -> Unread:
    if cfg.has_reward_model:
        if cfg.reward.normalize != "fixed":
            for key in ("mean", "std"):
                if _is_set(cfg.reward, key):
                    yield f"reward.{key}", f"reward.normalize is {cfg.reward.normalize}, not fixed"
        return
    for entry in fields(cfg.reward):
        if entry.name not in OF_RULES and _is_set(cfg.reward, entry.name):
            reason = "resource_pool.reward names no ranks, so there is no reward model"
            yield f"reward.{entry.name}", reason


def _schedule(cfg: Config) -> Unread:
    actor = cfg.actor_rollout
    if actor.lr_decay_style == "constant" and _is_set(actor, "min_lr"):
        yield "actor_rollout.min_lr", "lr_decay_style constant stays at lr"


def _microbatches(cfg: Config) -> Unread:
    for name in ("actor_rollout", "ref", "reward"):
        section = getattr(cfg, name)
        if section.max_tokens_per_microbatch is not None and _is_set(section, "micro_batch_size"):
            yield f"{name}.micro_batch_size", "max_tokens_per_microbatch cuts microbatches instead"


def _entropy(cfg: Config) -> Unread:
    control = cfg.algorithm.entropy_ctrl
    if control.type == "adaptive":
        return
    for key in ("target", "step", "max"):
        if _is_set(control, key):
            yield (
                f"algorithm.entropy_ctrl.{key}",
                "type fixed keeps entropy_coeff; adaptive steers it",
            )


def _correction(cfg: Config) -> Unread:
    correction = cfg.algorithm.correction
    recomputes = cfg.algorithm.old_logprobs == "recompute"
    weights = correction.weights_for(stale=cfg.training.staleness > 0 and recomputes)
    readers = (
        ("cap", "weights", weights, "clip"),
        ("low", "weights", weights, "mask"),
        ("high", "weights", weights, "mask"),
        ("reject_low", "reject", correction.reject, "sequence"),
        ("reject_high", "reject", correction.reject, "sequence"),
        ("veto", "reject", correction.reject, "token"),
    )
    for key, reader, chosen, needed in readers:
        if chosen != needed and _is_set(correction, key):
            reason = f"correction.{reader} is {chosen}; only {needed} reads it"
            yield f"algorithm.correction.{key}", reason


def _accumulation(cfg: Config) -> Unread:
    size = cfg.actor_rollout.ppo_mini_batch_size
    if cfg.training.updates == "accumulate" and size != cfg.num_samples:
        reason = f"updates: accumulate takes one step with all {cfg.num_samples} responses"
        yield "actor_rollout.ppo_mini_batch_size", reason


def _rounds(cfg: Config) -> Unread:
    algorithm = cfg.algorithm
    if algorithm.equal_groups != "replace" and _is_set(algorithm, "max_rounds"):
        reason = f"equal_groups is {algorithm.equal_groups}; only replace draws in rounds"
        yield "algorithm.max_rounds", reason


def _lora(cfg: Config) -> Unread:
    lora = cfg.actor_rollout.lora
    if lora.rank:
        return
    if lora.alpha is not None:
        yield "actor_rollout.lora.alpha", "without lora.rank there are no adapters"
    if lora.targets != list(LINEARS):
        yield "actor_rollout.lora.targets", "without lora.rank there are no adapters"


def _sequence_parallel(cfg: Config) -> Unread:
    if cfg.training.sequence_parallel and cfg.actor_rollout.tensor_model_parallel_size == 1:
        reason = "tensor_model_parallel_size is 1, so nothing is cut"
        yield "training.sequence_parallel", reason


def _colocated(cfg: Config) -> Unread:
    if not cfg.resource_pool.colocate:
        return
    for key in ("num_gpus_for_train", "num_gpus_for_infer"):
        if _is_set(cfg.actor_rollout, key):
            yield f"actor_rollout.{key}", "colocated, every rank has every role"


def _checkpoints(cfg: Config) -> Unread:
    training = cfg.training
    if training.keep_last is None:
        for key in ("keep_every", "keep_best"):
            if _is_set(training, key):
                yield f"training.{key}", "without keep_last all checkpoints are kept"
    if training.keep_best is None and _is_set(training, "best_score"):
        yield "training.best_score", "only keep_best asks which checkpoint is best"


def _evaluation(cfg: Config) -> Unread:
    training = cfg.training
    if not training.evaluates:
        reason = "there is no eval_data_path to evaluate on"
        for key in ("eval_interval", "eval_map_keys", "eval_samples_per_prompt"):
            if _is_set(training, key):
                yield f"training.{key}", reason
        if _differs_from_training(cfg, "temperature"):
            yield "training.eval_temperature", reason
    elif training.eval_temperature == 0 and not training.evaluation:
        reason = "eval_temperature 0 takes the most likely token"
    else:
        return
    for key in ("top_p", "top_k"):
        if _differs_from_training(cfg, key):
            yield f"training.eval_{key}", reason


def _differs_from_training(cfg: Config, key: str) -> bool:
    """Whether held-out problems are to be answered in another way than those trained on."""
    asked = getattr(cfg.training, f"eval_{key}")
    return asked is not None and asked != getattr(cfg.actor_rollout, key)


RULES = (
    _advantage,
    _kl,
    _reference,
    _reward_model,
    _schedule,
    _microbatches,
    _entropy,
    _correction,
    _accumulation,
    _rounds,
    _lora,
    _sequence_parallel,
    _colocated,
    _checkpoints,
    _evaluation,
)
