"""Validation before anything starts: the rules that configuration, world and files must meet.

A sentence names the key, its value and the nearest values that would work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from r1zero.algo.advantage import ADVANTAGES
from r1zero.algo.aggregation import AGGREGATIONS
from r1zero.algo.losses import LOSSES
from r1zero.checkpoint.resume import check_resume
from r1zero.config.schema import Config, nodes, placement
from r1zero.distributed.detect import check_dtype, uses_npu
from r1zero.distributed.placement import Placement
from r1zero.distributed.shutdown import parse_moment
from r1zero.errors import (
    BadInput,
    multiple,
    multiples,
    nearest,
    neighbours,
    product_text,
    readable,
    shown,
)
from r1zero.observe.trackers import check_loggers
from r1zero.policy.actor_config import objective_of
from r1zero.preflight.check_custom import check_custom
from r1zero.preflight.files import check_inputs
from r1zero.preflight.model import check_models
from r1zero.preflight.outputs import check_outputs
from r1zero.reward.rules import check_names

Bound = tuple[Callable[[Any], bool], str]


def _between(low: float, high: float, example: float) -> Bound:
    return lambda value: low <= value <= high, f"must be from {low} to {high}, such as {example}"


AT_LEAST_1: Bound = (lambda value: value >= 1, "must be at least 1")
BELOW_1: Bound = (lambda value: 0 <= value < 1, "must be at least 0 and below 1, such as 0.9")
NOT_NEGATIVE: Bound = (lambda value: value >= 0, "must not be negative; 0 is the least")
MOST_RANKS = 2**16  # that an entry of the pool may have
SCORE = _between(-(10**6), 10**6, 1)  # what lies far outside leaves no digits of the other scores
TEMPERATURE = _between(0.01, 100, 1.0)  # logits divided by it stay finite

BOUNDS: dict[str, Bound] = {
    **dict.fromkeys(
        (
            "training.seq_length",
            "training.train_iters",
            "training.save_interval",
            "training.keep_last",
            "training.keep_every",
            "training.eval_interval",
            "actor_rollout.ppo_mini_batch_size",
            "actor_rollout.num_samples_per_step",
            "actor_rollout.max_prompt_length",
            "actor_rollout.max_running_samples",
            "actor_rollout.micro_batch_size",
            "actor_rollout.ppo_epochs",
            "actor_rollout.num_gpus_for_train",
            "actor_rollout.num_gpus_for_infer",
            "actor_rollout.tensor_model_parallel_size",
            "actor_rollout.pipeline_model_parallel_size",
            "actor_rollout.infer_tensor_parallel_size",
            "ref.tensor_model_parallel_size",
            "ref.pipeline_model_parallel_size",
            "ref.micro_batch_size",
            "reward.overlong_cache",
            "reward.repetition_ngram",
            "resource_pool.ranks_per_node",
        ),
        AT_LEAST_1,
    ),
    **dict.fromkeys(
        (
            "actor_rollout.adam_beta1",
            "actor_rollout.adam_beta2",
            "actor_rollout.lr_warmup_fraction",
        ),
        BELOW_1,
    ),
    **dict.fromkeys(
        (
            "training.seed",
            "training.report_interval",
            "training.publish_check_interval",
            "actor_rollout.lr_warmup_iters",
            "actor_rollout.clip_grad",
        ),
        NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        (
            "reward.accuracy.right",
            "reward.accuracy.wrong",
            "reward.accuracy.missing",
            "reward.cosine.right_short",
            "reward.cosine.right_long",
            "reward.cosine.wrong_short",
            "reward.cosine.wrong_long",
            "reward.cosine.exceeded",
        ),
        SCORE,
    ),
    "training.global_batch_size": _between(1, 10**6, 120),
    "training.distributed_timeout_minutes": _between(1, 10**5, 45),
    "training.publish_bucket_megabytes": _between(1, 4096, 64),
    "training.eval_samples_per_prompt": _between(1, 10**6, 4),
    "training.eval_temperature": (
        lambda value: value == 0 or TEMPERATURE[0](value),
        f"{TEMPERATURE[1]}, or 0 for the most likely token",
    ),
    "training.profile_steps": (
        lambda value: all(step >= 1 for step in value),
        "must list steps from 1 on",
    ),
    "actor_rollout.n_samples_per_prompt": (
        lambda value: 2 <= value <= 10**6,
        "must be at least 2, at most 1000000: group_norm compares the responses of a prompt",
    ),
    "actor_rollout.temperature": TEMPERATURE,
    **dict.fromkeys(
        ("actor_rollout.top_p", "training.eval_top_p"),
        (lambda value: 1e-6 <= value <= 1, "must be at least 1e-06, at most 1; 1.0 turns it off"),
    ),
    **dict.fromkeys(
        ("actor_rollout.top_k", "training.eval_top_k"),
        (lambda value: value >= -1, "must be at least 1, or 0 or -1 to turn it off"),
    ),
    "actor_rollout.clip_ratio": (
        lambda value: 0 < value < 1,
        "must be between 0 and 1, such as 0.2",
    ),
    "actor_rollout.clip_ratio_low": (
        lambda value: 0 < value <= 1,
        "must be above 0, at most 1, such as 0.2",
    ),
    "actor_rollout.clip_ratio_high": (
        lambda value: 0 < value <= 100,
        "must be above 0, at most 100, such as 0.28",
    ),
    "actor_rollout.entropy_coeff": _between(0, 1, 0.001),
    "actor_rollout.lr": _between(0, 1, 1e-6),
    "actor_rollout.min_lr": _between(0, 1, 0),
    "actor_rollout.weight_decay": _between(0, 1, 0.01),
    # 0 in fp32 would divide 0 by 0 where no gradient was
    "actor_rollout.adam_eps": _between(1e-20, 1, 1e-8),
    "actor_rollout.do_sample": (bool, "must be true: greedy responses of a group are all equal"),
    "actor_rollout.shuffle_minibatch": (
        lambda value: not value,
        "must be false: minibatches are composed before generation starts, and prompts are "
        "shuffled anyway unless training.no_shuffle is set",
    ),
    "reward.verifier": (
        bool,
        "must be true: responses are scored by rules, there is no reward model",
    ),
    "reward.workers": _between(1, 1024, 2),
    "reward.deadline_seconds": _between(0.01, 86400, 10),
    "reward.worker_memory_megabytes": (
        lambda value: value >= 64,
        "must be at least 64, such as 1024",
    ),
    "reward.max_failure_rate": (
        lambda value: 0 <= value <= 1,
        "must be from 0 to 1, such as 0.05; 1 never stops",
    ),
    "algorithm.gamma": (
        lambda value: value == 1,
        "must be 1.0: group_norm gives all tokens of a response one advantage",
    ),
    "algorithm.kl_ctrl.kl_coef": _between(0, 100, 0.05),
    "algorithm.verifier_weight": (
        lambda value: all(map(SCORE[0], value)),
        f"{SCORE[1]}, each of them",
    ),
    "resource_pool.reward": (
        lambda value: not any(value),
        "must be []: rules score on CPUs, there is no reward model",
    ),
}

CHOICES: dict[str, tuple[str, ...]] = {
    "training.distributed_backend": ("hccl", "nccl", "gloo"),
    "training.on_save_failure": ("go_on", "stop"),
    "training.on_broken_invariant": ("stop", "warn"),
    "actor_rollout.lr_decay_style": ("constant", "linear", "cosine", "inverse-square-root"),
    "actor_rollout.recompute_granularity": ("full",),
    "reward.accuracy.copied_span": ("wrong", "right"),
    "algorithm.kl_penalty": ("kl", "abs", "mse", "low_var_kl"),
    "algorithm.kl_ctrl.type": ("fixed", "adaptive"),
}
REFUSED = {
    "full": ": it needs all logits of both models, which are never held",
}


def check(
    cfg: Config,
    world_size: int | None = None,
    node_of_rank: Sequence[int] | None = None,
    absent_ok: bool = False,
) -> list[str]:
    """Return a sentence for every rule that `cfg` breaks in this world (default: what its pool asks
    for).

    With `absent_ok`, model folders and data files that are not on this machine pass.
    """
    with readable():
        return check_values(cfg) or _check(cfg, world_size, node_of_rank, absent_ok)


def _check(
    cfg: Config, world_size: int | None, node_of_rank: Sequence[int] | None, absent_ok: bool
) -> list[str]:
    """What keys say together, and the files; single values are right."""
    problems = check_algorithm(cfg)
    pool = check_pool(cfg)
    problems += pool
    if world_size is None:
        world_size = cfg.world_size
    placed = None
    if not pool:
        found, placed = check_placement(cfg, world_size, node_of_rank or nodes(cfg, world_size))
        problems += found
    if placed is not None:
        problems += check_batches(cfg, placed)
    problems += check_lengths(cfg) + check_models(cfg) + check_inputs(cfg, absent_ok)
    problems += check_loggers(cfg.training.logger, installed=not absent_ok) + check_device(
        cfg, absent_ok
    )
    if problems or absent_ok:
        return problems
    # The last two make a folder, for a moment, and start a process.
    return check_resume(cfg) or check_outputs(cfg) or check_custom(cfg)


def check_device(cfg: Config, elsewhere: bool) -> list[str]:
    """What the devices of this machine must be able to do; `elsewhere` if the run may be on
    another."""
    backend = cfg.training.distributed_backend
    problems = check_dtype(
        f"training.bf16: {shown(cfg.training.bf16)}", bool(cfg.training.bf16), backend
    )
    if cfg.actor_rollout.decode_graphs and not elsewhere and not uses_npu(backend):
        problems.append(
            "actor_rollout.decode_graphs: true needs NPUs, and this run would be on none; set it "
            "to false"
        )
    return problems


def check_values(cfg: Config) -> list[str]:
    """Each key by itself."""
    problems = []
    for key, (holds, sentence) in BOUNDS.items():
        value = attrgetter(key)(cfg)
        if value is not None and not holds(value):
            problems.append(f"{key}: {shown(value)} {sentence}")
    for key, known in CHOICES.items():
        value = attrgetter(key)(cfg)
        if value is not None and value not in known:
            reason = REFUSED.get(value, "") or nearest(value, known)
            problems.append(f"{key}: {value} is not one of {', '.join(known)}{reason}")
    if cfg.training.exit_before is not None:
        try:
            parse_moment(cfg.training.exit_before, 0.0)
        except BadInput as error:
            problems.append(f"training.exit_before: {error}")
    return problems


def check_algorithm(cfg: Config) -> list[str]:
    """Rules among keys of rewards, KL and schedule."""
    return check_rewards(cfg) + check_objective(cfg) + _check_kl(cfg) + _check_schedule(cfg)


def check_objective(cfg: Config) -> list[str]:
    """Names and settings of loss, aggregation and advantage. Own functions are loaded."""
    algorithm = cfg.algorithm
    problems = LOSSES.problems(algorithm.loss)
    if algorithm.aggregation is not None:
        problems += AGGREGATIONS.problems(algorithm.aggregation)
    if algorithm.advantage in (None, algorithm.adv_estimator):  # only the older key was given
        problems += ADVANTAGES.problems(algorithm.adv_estimator, "algorithm.adv_estimator")
    else:
        problems += ADVANTAGES.problems(algorithm.advantage)
    if problems:
        return problems
    try:
        objective_of(algorithm, cfg.actor_rollout)
    except BadInput as error:
        return [str(error)]
    return []


def check_rewards(cfg: Config) -> list[str]:
    rules = cfg.algorithm.verifier_function
    weights = cfg.algorithm.verifier_weight
    problems = [f"algorithm.verifier_function: {problem}" for problem in check_names(rules)]
    if len(rules) != len(weights):
        even = [round(1 / max(1, len(rules)), 2)] * len(rules)
        problems.append(
            f"algorithm.verifier_weight: {weights} has {len(weights)} weights for the "
            f"{len(rules)} rules of verifier_function {rules}; give as many, such as "
            f"{even}"
        )
    return problems


def _check_kl(cfg: Config) -> list[str]:
    control = cfg.algorithm.kl_ctrl
    if control.type != "adaptive":
        return []
    needed = (("target_kl", control.target_kl, 0.1), ("horizon", control.horizon, 10000))
    return [
        (
            f"algorithm.kl_ctrl.{key}: {shown(value)} must be above 0 with type adaptive, such as "
            f"{example}"
        )
        for key, value, example in needed
        if value is None or value <= 0
    ]


def _check_schedule(cfg: Config) -> list[str]:
    problems = []
    actor = cfg.actor_rollout
    if actor.min_lr > actor.lr:
        problems.append(
            f"actor_rollout.min_lr: {actor.min_lr} must not be above lr {actor.lr}; 0.0 works"
        )
    if actor.lr_warmup_iters and actor.lr_warmup_fraction:
        problems.append(
            f"actor_rollout.lr_warmup_iters: {actor.lr_warmup_iters} and lr_warmup_fraction "
            f"{actor.lr_warmup_fraction} exclude each other; set one of them to 0"
        )
    updates = cfg.training.train_iters * cfg.updates_per_step
    if actor.lr_warmup_iters >= max(1, updates):
        problems.append(
            f"actor_rollout.lr_warmup_iters: {actor.lr_warmup_iters} must be below the {updates} "
            f"updates of the run; {max(0, updates - 1)} is the most"
        )
    return problems


def check_pool(cfg: Config) -> list[str]:
    """The counts of ranks against each other and against the grids."""
    actor = cfg.actor_rollout
    ref = cfg.ref
    pool = cfg.resource_pool
    for key, entries in (("actor_rollout", pool.actor_rollout), ("ref", pool.ref)):
        if not all(1 <= entry <= MOST_RANKS for entry in entries):
            return [f"resource_pool.{key}: {entries} must list numbers of ranks, such as [8, 6]"]
    if pool.colocate:
        return []
    problems = []
    total = actor.num_gpus_for_train + actor.num_gpus_for_infer
    if sum(pool.actor_rollout) != total:
        problems.append(
            f"resource_pool.actor_rollout: {pool.actor_rollout} adds up to "
            f"{sum(pool.actor_rollout)}, but num_gpus_for_train "
            f"{actor.num_gpus_for_train} + num_gpus_for_infer "
            f"{actor.num_gpus_for_infer} = {total}; [{total}] would work"
        )
    tp = actor.tensor_model_parallel_size
    pp = actor.pipeline_model_parallel_size
    problems += multiple(
        "actor_rollout.num_gpus_for_train",
        actor.num_gpus_for_train,
        [("tensor_model_parallel_size", tp), ("pipeline_model_parallel_size", pp)],
    )
    problems += multiple(
        "actor_rollout.num_gpus_for_infer",
        actor.num_gpus_for_infer,
        [("infer_tensor_parallel_size", actor.infer_tensor_parallel_size or tp)],
    )
    problems += multiple(
        "resource_pool.ref",
        sum(pool.ref),
        [
            ("ref.tensor_model_parallel_size", ref.tensor_model_parallel_size),
            ("ref.pipeline_model_parallel_size", ref.pipeline_model_parallel_size),
        ],
    )
    largest = max(pool.actor_rollout + pool.ref)
    if pool.ranks_per_node is not None and largest > pool.ranks_per_node:
        problems.append(
            f"resource_pool.ranks_per_node: {pool.ranks_per_node} is less than the {largest} "
            f"ranks that an entry of the pool puts on one node; {largest} would work"
        )
    return problems


def check_placement(
    cfg: Config, world_size: int, node_of_rank: Sequence[int]
) -> tuple[list[str], Placement | None]:
    """The pool against the world and its nodes. The placement is None when there is none."""
    if world_size == 1:
        keys = [
            "actor_rollout.tensor_model_parallel_size",
            "actor_rollout.pipeline_model_parallel_size",
            "actor_rollout.infer_tensor_parallel_size",
            "ref.tensor_model_parallel_size",
            "ref.pipeline_model_parallel_size",
        ]
        wrong = [
            f"{key}: {attrgetter(key)(cfg)} must be 1 in a world of one rank; start "
            f"{cfg.world_size} processes or set it to 1"
            for key in keys
            if attrgetter(key)(cfg) != 1
        ]
        if wrong:
            return (wrong, None)
        return ([], placement(cfg, 1))
    try:
        placed = placement(cfg, world_size)
    except BadInput as error:
        return [f"resource_pool: {error}"], None
    crossed = placed.nodes_crossed(list(node_of_rank))
    return [f"resource_pool: {sentence}" for sentence in crossed], placed


def check_batches(cfg: Config, placed: Placement) -> list[str]:
    """Divisibility of the batch sizes, with the replicas that each role has."""
    actor = cfg.actor_rollout
    ref = cfg.ref
    rollout = [
        ("rollout replicas", placed.rollout.dp),
        ("num_samples_per_step", actor.num_samples_per_step),
    ]
    prompts = [rollout]
    minibatch = [rollout]
    if actor.max_tokens_per_microbatch is None:
        train = [("train replicas", placed.train.dp), ("micro_batch_size", actor.micro_batch_size)]
        prompts.append(train)
        minibatch.append(train)
    if ref.max_tokens_per_microbatch is None:
        prompts.append(
            [("ref replicas", placed.ref.dp), ("ref.micro_batch_size", ref.micro_batch_size)]
        )
    size = actor.ppo_mini_batch_size
    samples = cfg.num_samples
    problems = multiples("training.global_batch_size", cfg.training.global_batch_size, prompts)
    step = math.lcm(*(math.prod(value for _, value in factors) for factors in minibatch))
    if samples % step == 0:
        works = [step * number for number in _divisors(samples // step)]
    else:
        works = []
    if samples % size:
        problems.append(
            f"actor_rollout.ppo_mini_batch_size: {size} must divide the {samples} responses of a "
            f"global batch of {cfg.training.global_batch_size} prompts; {neighbours(size, works)}"
        )
    for factors in minibatch:
        product = math.prod(value for _, value in factors)
        if size % product:
            problems.append(
                f"actor_rollout.ppo_mini_batch_size: {size} must be a multiple of {product} = "
                f"{product_text(factors)}; {neighbours(size, works)}"
            )
    return problems


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return small + [number // divisor for divisor in small]


def check_lengths(cfg: Config) -> list[str]:
    """Lengths of sequences against each other."""
    actor = cfg.actor_rollout
    length = cfg.training.seq_length
    problems = []
    if actor.max_prompt_length >= length:
        problems.append(
            f"actor_rollout.max_prompt_length: {actor.max_prompt_length} leaves no room for a "
            f"response in seq_length {length}; {length - 1} is the most"
        )
    for key in (
        "actor_rollout.max_tokens_to_oom",
        "actor_rollout.max_tokens_per_microbatch",
        "ref.max_tokens_per_microbatch",
    ):
        value = attrgetter(key)(cfg)
        if value is not None and value < length:
            problems.append(
                f"{key}: {value} is less than one sequence of seq_length {length} tokens; "
                f"{length} is the least"
            )
    return problems
