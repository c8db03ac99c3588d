"""What the model of the step is fed with: measured by a run itself, or guessed for NPUs before one.

The guess is for a die like that of Ascend's 910C and was measured by nobody: public figures of the
die, shares of them that such programs commonly reach, and a decode step fitted so that one public
figure of another trainer comes out (docs/scale.md). It scales with the model's floating-point
operations, weights and layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist, fmean

import numpy as np

from r1zero.config.schema import Config
from r1zero.distributed.placement import Placement, RankGrid
from r1zero.models.config import ModelConfig
from r1zero.models.family import family_of
from r1zero.models.params import Shards, num_elements, param_table
from r1zero.preflight.found import dtype_of
from r1zero.preflight.step_model import Job, Lengths, LogNormal, Rates, predict

# Of one die; bf16.
PEAK = 376e12  # FLOP/s of a 910C die, of arXiv:2506.12708
LEARN_SHARE = 0.30  # of the peak, in the update, without the pipeline's bubble
FORWARD_SHARE = 0.35  # in forward passes over whole sequences
DECODE_SHARE = 0.5  # in the products of a decode step
BANDWIDTH = 0.6 * 1.6e12  # bytes/s from memory
LINK = 16e9  # bytes/s into a rank while weights are published
# Of a decode step, beside weights and rows: launches, all-reduces, sampling. For 28 layers, by
# graphs and without.
FLOOR_LAYERS = 28
GRAPH_FLOOR = 0.0108
EAGER_FLOOR = 0.030
OPTIMIZER = 0.4 / 0.95e9  # seconds of an optimizer step for each parameter of a rank
BUS = 20e9  # bytes/s between host and device, where the optimizer's state visits
# Of the lengths that are allowed.
MEAN_RESPONSE = 1 / 3
MEAN_PROMPT = 1 / 10
SIGMA = 0.7
GUESS = "a guess for NPUs like 910C, measured by nobody"

# Floating-point operations of a token for each parameter.
FORWARD_FLOPS = 2
LEARN_FLOPS = 6
RECOMPUTE_FLOPS = 8  # the forward pass twice
WEIGHT_GRADIENT_FLOPS = 2  # of LEARN_FLOPS; frozen weights have none


# -- before a run ----------------------------------------------------------------------------------


def guessed_rates(
    cfg: Config, placed: Placement, shape: ModelConfig, reward: ModelConfig | None = None
) -> Rates:
    """How fast a replica of each role may be on NPUs. `shape` is that of the policy, and of what has no
    other; `reward` that of a reward model."""
    actor = cfg.actor_rollout
    size = dtype_of(cfg).itemsize
    parameters = shape.num_parameters
    active = shape.num_active_parameters
    train = placed.train.size // placed.train.dp  # ranks of a replica, as the next two
    rollout = placed.rollout.tp
    ref = placed.ref.size // placed.ref.dp if placed.ref is not None else 1
    forward = FORWARD_FLOPS * active / (PEAK * FORWARD_SHARE)
    judge = 0.0
    if "reward" in placed.roles:
        grid = placed.roles["reward"]
        of_model = (reward or shape).num_active_parameters
        judge = FORWARD_FLOPS * of_model / (PEAK * FORWARD_SHARE) / (grid.size // grid.dp)
    learn = LEARN_FLOPS
    if actor.recompute_granularity == "full":
        learn = RECOMPUTE_FLOPS
    if actor.lora.rank:
        learn -= WEIGHT_GRADIENT_FLOPS
    if cfg.base_is_reference:
        learn += FORWARD_FLOPS
    optimizer = OPTIMIZER * _rank_parameters(shape, placed.train)
    if cfg.training.optimizer_offload:  # there and back
        state = parameters / placed.train.size * dtype_of(cfg).optimizer_bytes
        optimizer += 2 * state / BUS
    eager = actor.decode_graphs is False or placed.rollout.experts_span_replicas
    floor = EAGER_FLOOR if eager else GRAPH_FLOOR
    floor *= shape.num_layers / FLOOR_LAYERS
    context = MEAN_PROMPT * actor.max_prompt_length + MEAN_RESPONSE * cfg.response_budget / 2
    cache = family_of(shape).kv_cache_elements(shape, rollout) * size * context
    held = _rank_parameters(shape, placed.rollout) * size
    product = FORWARD_FLOPS * active / rollout / (PEAK * DECODE_SHARE)
    return Rates(
        decode_step=floor + held / BANDWIDTH,
        decode_row=product + cache / BANDWIDTH,
        prefill=forward / rollout,
        ref=forward / ref,
        reward=judge,
        learn=learn * active / (PEAK * LEARN_SHARE) / train,
        look=forward / train,
        optimizer=optimizer,
        publish=held / LINK,
        source=GUESS,
    )


def _rank_parameters(shape: ModelConfig, span: RankGrid) -> float:
    """Parameters on a rank, on average over its stages."""
    shards = Shards.of_grid(span)
    return sum(num_elements(spec, shards) for spec in param_table(shape)) / span.pp


def guessed_lengths(cfg: Config) -> LogNormal:
    """Lengths of responses before any was seen."""
    return LogNormal(MEAN_RESPONSE * cfg.response_budget, SIGMA, cfg.response_budget)


def job_of(cfg: Config, prompt_tokens: float | None = None, response: float | None = None) -> Job:
    """The batch of a configuration; mean lengths of a prompt and a response where they are known."""
    actor = cfg.actor_rollout
    if prompt_tokens is None:
        prompt_tokens = MEAN_PROMPT * actor.max_prompt_length
    if response is None:
        response = MEAN_RESPONSE * cfg.response_budget
    sample = prompt_tokens + response
    return Job(
        prompts=cfg.training.global_batch_size,
        group_size=actor.n_samples_per_prompt,
        minibatch_size=actor.ppo_mini_batch_size,
        prompt_tokens=prompt_tokens,
        longest=cfg.response_budget,
        microbatch=_samples(actor.max_tokens_per_microbatch, actor.micro_batch_size, sample),
        ref_microbatch=_samples(
            cfg.ref.max_tokens_per_microbatch, cfg.ref.micro_batch_size, sample
        ),
        reward_microbatch=_samples(
            cfg.reward.max_tokens_per_microbatch, cfg.reward.micro_batch_size, sample
        ),
        epochs=actor.ppo_epochs,
        max_running=actor.max_running_samples,
        cache_tokens=actor.max_tokens_to_oom,
        updates=cfg.training.updates,
        minibatch_order=cfg.training.minibatch_order,
        old_logprobs=cfg.algorithm.old_logprobs,
        staleness=cfg.training.staleness,
        parts=cfg.parts,
    )


def _samples(tokens: int | None, samples: int, sample: float) -> float:
    """How many responses a microbatch holds: `samples`, or those that fit its budget of tokens."""
    if tokens is None:
        return samples
    return max(1.0, tokens / sample)


# -- from a run ------------------------------------------------------------------------------------


def measured_lengths(steps: Sequence[Mapping[str, float]], cfg: Config) -> LogNormal:
    """Lengths as some steps had them, from their mean, longest and share at the limit.

    Of n lengths about one in n + 1 exceeds the longest; where more are cut at the limit, their share
    does. With z such that a standard normal exceeds it as often, a log-normal has

        ln longest = ln mean - sigma^2 / 2 + z sigma

    which gives sigma.
    """
    mean = fmean(step["response_length/mean"] for step in steps)
    longest = fmean(step["response_length/max"] for step in steps)
    beyond = max(fmean(step["response_truncated"] for step in steps), 1 / (cfg.num_samples + 1))
    z = NormalDist().inv_cdf(1 - min(beyond, 0.5))
    sigma = z - math.sqrt(max(0.0, z**2 - 2 * math.log(longest / mean)))
    return LogNormal(mean, sigma, cfg.response_budget)


def measured_job(steps: Sequence[Mapping[str, float]], cfg: Config) -> Job:
    """The batch, with the mean lengths that some steps had."""
    prompt = fmean(step["tokens/prompt"] for step in steps) / cfg.num_samples
    return job_of(cfg, prompt, fmean(step["response_length/mean"] for step in steps))


def measured_rates(
    steps: Sequence[Mapping[str, float]], placed: Placement, job: Job, lengths: Lengths
) -> Rates:
    """How fast a replica of each role was in some steps, from their metrics.

    The model with rates of 1 says how much work a step is; the seconds that it took do the rest.
    Prefill is within decoding, the optimizer step within learning.
    """
    phases = ("ref", "reward_model", "update")
    seconds = {name: fmean(step.get(f"time/{name}", 0.0) for step in steps) for name in phases}
    decode_step, decode_row = _decode_rates(steps, placed.rollout.dp)
    unit = Rates(
        decode_step=0,
        decode_row=0,
        prefill=0,
        ref=1,
        reward=1,
        learn=1,
        look=FORWARD_FLOPS * LEARN_SHARE / (RECOMPUTE_FLOPS * FORWARD_SHARE),
        optimizer=0,
        publish=0,
        source="",
    )
    work = predict(placed, job, unit, lengths).busy
    learn = seconds["update"] / work["train"]
    return replace(
        unit,
        decode_step=decode_step,
        decode_row=decode_row,
        ref=seconds["ref"] / work["ref"] if "ref" in work else 0.0,
        reward=seconds["reward_model"] / work["reward"] if "reward" in work else 0.0,
        learn=learn,
        look=learn * unit.look,
        publish=fmean(step["time/publish"] for step in steps),
        source=f"measured in the last {len(steps)} steps",
    )


def _decode_rates(steps: Sequence[Mapping[str, float]], replicas: int) -> tuple[float, float]:
    """Seconds of a decode step, and more for each row: what explains the steps' rollout best.

    A replica takes as many decode steps as the longest response has tokens, and one row more for
    each token. Least squares; where that makes one of the two negative, the other is all.
    """
    longest = np.array([step["response_length/max"] for step in steps])
    rows = np.array([step["tokens/response"] for step in steps]) / replicas
    seconds = np.array([step["time/rollout"] for step in steps])
    both, *_ = np.linalg.lstsq(np.stack([longest, rows], axis=1), seconds, rcond=None)
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    by_longest = float(longest @ seconds / (longest @ longest))
    by_rows = float(rows @ seconds / (rows @ rows))
    if np.abs(by_longest * longest - seconds).sum() < np.abs(by_rows * rows - seconds).sum():
        return by_longest, 0.0
    return 0.0, by_rows
