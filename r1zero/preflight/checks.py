"""Validation before anything starts: the rules that configuration, world and files must meet.

A sentence names the key, its value and the nearest values that would work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from r1zero.algo.advantages import ADVANTAGES
from r1zero.algo.aggregation import AGGREGATIONS, DEFAULT, try_aggregation
from r1zero.algo.losses import LOSSES
from r1zero.algo.objective import Objective
from r1zero.checkpoint.resume import check_resume
from r1zero.config.rules import check_keys
from r1zero.config.schema import ADVANTAGE, Config
from r1zero.data.sources import eval_sources, train_sources
from r1zero.distributed.detect import check_dtype, uses_npu
from r1zero.distributed.npu_environment import present
from r1zero.errors import BadInput, neighbours, readable, shown
from r1zero.models.dtype import Dtype
from r1zero.models.lora import lora_config
from r1zero.observe.trackers import check_loggers
from r1zero.policy.actor_config import objective_of
from r1zero.preflight.check_advantage import check_advantage
from r1zero.preflight.check_custom import check_custom
from r1zero.preflight.environment import Asked, queue_for_graphs
from r1zero.preflight.files import check_inputs
from r1zero.preflight.found import Found, dtype_of, look
from r1zero.preflight.model import check_models
from r1zero.preflight.outputs import check_outputs
from r1zero.preflight.replay import check_replay
from r1zero.preflight.reward_model import check_reward_model
from r1zero.reward.choose import check_each, gives_verdict
from r1zero.rollout.engines import engine_problems

# |mean over a response of log p - log p of the rollout engine|, as bf16 may have it; what
# algorithm.correction.reject_low and reject_high let pass.
MEAN_MISMATCH = 0.01


def check(
    cfg: Config,
    world_size: int | None = None,
    node_of_rank: Sequence[int] | None = None,
    absent_ok: bool = False,
) -> list[str]:
    """Look at what a configuration needs, and check it: see check_found."""
    with readable():
        return check_found(look(cfg, world_size, node_of_rank), absent_ok)


def check_found(found: Found, absent_ok: bool = False) -> list[str]:
    """Return a sentence for every rule that is broken by what was found.

    With `absent_ok`, model folders and data files that are not on this machine pass.
    """
    with readable():
        return _check(found, absent_ok)


def _check(found: Found, absent_ok: bool) -> list[str]:
    """What keys say together, and the files; single values are right."""
    cfg = found.config
    problems = check_keys(cfg, found.world_size) + check_rewards(cfg) + check_objective(cfg)
    problems += found.misplaced
    problems += check_batches(cfg)
    problems += engine_problems(cfg.actor_rollout.engine)
    problems += check_models(found)
    problems += check_replay(cfg, found.actor.shape)
    problems += check_reward_model(found)
    problems += check_inputs(found, absent_ok)
    problems += check_loggers(cfg.training.logger, installed=not absent_ok)
    problems += check_device(cfg, absent_ok)
    if problems or absent_ok:
        return problems
    actor = found.actor
    assert actor.shape is not None, "else check_inputs had found its folder wanting"
    # The last two make a folder, for a moment, and start a process.
    return (
        check_resume(
            cfg.checkpoints,
            cfg.training.resume,
            actor.load,
            actor.shape,
            lora_config(cfg.actor_rollout),
        )
        or check_outputs(found)
        or check_custom(cfg)
    )


def check_device(cfg: Config, elsewhere: bool) -> list[str]:
    """What the devices of this machine must be able to do; `elsewhere` if the run may be on
    another."""
    backend = cfg.training.distributed_backend
    problems = check_dtype(
        f"training.bf16: {shown(cfg.training.bf16)}", dtype_of(cfg) is Dtype.BF16, backend
    )
    graphs = cfg.actor_rollout.decode_graphs  # None: on NPUs
    if graphs is False or elsewhere:
        return problems
    if uses_npu(backend):
        if sentence := queue_for_graphs(present(), Asked(graphs=True)):
            problems.append(sentence)
    elif graphs:
        problems.append(
            "actor_rollout.decode_graphs: true needs NPUs, and this run would be on none; set it "
            "to false"
        )
    return problems


def check_objective(cfg: Config) -> list[str]:
    """Names and settings of loss, aggregation and advantage. Own functions are loaded."""
    algorithm = cfg.algorithm
    problems = LOSSES.problems(algorithm.loss)
    if algorithm.aggregation is not None:
        problems += AGGREGATIONS.problems(algorithm.aggregation)
    advantage = algorithm.advantage or ADVANTAGE
    if advantage == algorithm.adv_estimator:  # only the older key was given
        problems += ADVANTAGES.problems(advantage, "algorithm.adv_estimator")
    else:
        problems += ADVANTAGES.problems(advantage)
    if problems:
        return problems
    try:
        objective = objective_of(algorithm, cfg.actor_rollout)
        try_aggregation(algorithm.aggregation or DEFAULT, objective.aggregation)
    except BadInput as error:
        return [str(error)]
    return check_ratio(cfg, objective) + check_advantage(cfg, objective)


def check_ratio(cfg: Config, objective: Objective) -> list[str]:
    """Whether the ratio of the loss can be taken to the rollout engine, if it is asked to be."""
    if cfg.algorithm.old_logprobs != "rollout":
        return []
    bounds = [objective.settings.get(name, math.inf) for name in ("clip_low", "clip_high")]
    if objective.loss.ratio == "none":
        reason = "has no ratio that would correct for the engine that drew the tokens"
    elif objective.loss.ratio == "sequence" and min(bounds) < MEAN_MISMATCH:
        reason = (
            f"cuts responses off whose ratio is {min(bounds):g} from 1, where the mismatch of engine "
            f"and trainer alone may bring it to {MEAN_MISMATCH:g}"
        )
    else:
        return []
    return [
        "algorithm.old_logprobs: rollout does not go with the loss "
        f"{cfg.algorithm.loss}, which {reason}; set it to recompute"
    ]


def check_rewards(cfg: Config) -> list[str]:
    """The reward functions, of the run and of each data set: each is known, declares what it needs,
    and takes its settings."""
    settings = cfg.reward.settings
    lists = {"algorithm.verifier_function": cfg.algorithm.verifier_function}
    for source in (*train_sources(cfg), *eval_sources(cfg)):
        if source.name:
            lists[source.scorers_key] = list(source.scorers)
    if problems := check_each(lists, settings):
        return problems
    bounds = cfg.algorithm.keep_accuracy
    trained = {name for source in train_sources(cfg) for name in source.scorers}
    if bounds is not None and not gives_verdict(sorted(trained), settings):
        return [
            f"algorithm.keep_accuracy: {bounds} needs a reward function that says which responses "
            f"are right, and verifier_function {cfg.algorithm.verifier_function} has none; name acc, "
            "too, or remove the key"
        ]
    return []


def check_batches(cfg: Config) -> list[str]:
    """The minibatches must fill a global batch. How many replicas share them, and into microbatches
    of what size they cut them, is free: shares may differ, and be empty."""
    size = cfg.minibatch_size
    samples = cfg.num_samples
    if samples % size == 0:
        return []
    return [
        f"actor_rollout.ppo_mini_batch_size: {size} must divide the {samples} responses of a "
        f"global batch of {cfg.training.global_batch_size} prompts; "
        f"{neighbours(size, _divisors(samples))}"
    ]


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return small + [number // divisor for divisor in small]
