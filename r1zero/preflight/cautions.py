"""What a configuration may say and seldom means well: a warning for each, told before the start."""

from __future__ import annotations

from r1zero.algo.losses import LOSSES
from r1zero.config.schema import Config
from r1zero.preflight.found import Found


def cautions(cfg: Config) -> list[str]:
    """Return a sentence for everything that deserves a second look."""
    return _cut_sampling(cfg) + _several_updates(cfg) + _mean_mismatch(cfg)


def node_cautions(found: Found) -> list[str]:
    """The same of where ranks lie: context-parallel groups that span nodes."""
    if found.placement is None:
        return []
    crossed = found.placement.slow_nodes_crossed(found.node_of_rank)
    size = found.config.training.context_parallel_size
    return [f"training.context_parallel_size: {size}: {sentence}" for sentence in crossed]


def _several_updates(cfg: Config) -> list[str]:
    """From the second update of a step on, its samples are those of other weights."""
    updates = cfg.updates_per_step
    if LOSSES[cfg.algorithm.loss].ratio != "none" or updates == 1:
        return []
    return [
        f"algorithm.loss: {cfg.algorithm.loss} has no ratio that corrects for the weights that drew, "
        f"and all but the first of the {updates} updates of a step learn with others; set "
        f"actor_rollout.ppo_mini_batch_size to {cfg.num_samples} and ppo_epochs to 1, or take another "
        "loss"
    ]


def _mean_mismatch(cfg: Config) -> list[str]:
    """One ratio of a response, to the rollout engine, scales all its tokens by their mean mismatch."""
    algorithm = cfg.algorithm
    if algorithm.old_logprobs != "rollout" or LOSSES[algorithm.loss].ratio != "sequence":
        return []
    return [
        "algorithm.old_logprobs: rollout puts the mismatch of engine and trainer, as a mean over a "
        f"response, into the ratio of the loss {algorithm.loss}, which weighs all its tokens; look at "
        "mismatch/sequence, or set it to recompute"
    ]


def _cut_sampling(cfg: Config) -> list[str]:
    """Log-probs are those of the whole distribution, so tokens that a cut left over are drawn more
    often than ratios, KL and entropy know of."""
    actor = cfg.actor_rollout
    cuts = []
    if actor.top_p < 1:
        cuts.append(f"actor_rollout.top_p: {actor.top_p:g}")
    if actor.top_k > 0:
        cuts.append(f"actor_rollout.top_k: {actor.top_k}")
    if not cuts:
        return []
    return [
        f"{' and '.join(cuts)} cut what training samples from, while its log-probs are those of the "
        "whole distribution: tokens are drawn by another policy than the one that learns; set top_p "
        "to 1 and top_k to 0, or keep the cut for evaluation (training.eval_top_p, eval_top_k)"
    ]
