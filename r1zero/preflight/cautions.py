"""What a configuration may say and seldom means well: a warning for each, told before the start."""

from __future__ import annotations

from r1zero.config.schema import Config


def cautions(cfg: Config) -> list[str]:
    """Return a sentence for everything that deserves a second look."""
    return _cut_sampling(cfg)


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
