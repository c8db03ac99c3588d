"""What an advantage estimator declares, against the other keys; and a trial call of it."""

from __future__ import annotations

import numpy as np

from r1zero.algo.advantages import Advantage, try_out
from r1zero.algo.objective import Objective
from r1zero.config.schema import ADVANTAGE, Config
from r1zero.data.sources import train_sources
from r1zero.errors import BadInput
from r1zero.reward.choose import gives_verdict


def check_advantage(cfg: Config, objective: Objective) -> list[str]:
    """Return a sentence for everything that does not go with the chosen estimator."""
    chosen = objective.advantage
    problems = [
        *_twice_whitened(cfg, chosen),
        *_accumulated(cfg, chosen),
        *_skipped(cfg, chosen),
        *_left_out(cfg, chosen),
        *_cut(cfg, chosen),
        *_without_verdict(cfg, chosen),
        *_of_other_functions(cfg, chosen),
    ]
    if problems:
        return problems
    weights = np.array(cfg.score_weights)
    size = cfg.actor_rollout.n_samples_per_prompt
    try:
        try_out(chosen, objective.advantage_settings, size, weights)
    except BadInput as error:
        return [str(error)]
    return []


def _name(cfg: Config) -> str:
    """The estimator as the user calls it."""
    return cfg.algorithm.advantage or cfg.algorithm.adv_estimator or ADVANTAGE


def _twice_whitened(cfg: Config, chosen: Advantage) -> list[str]:
    if chosen.whitens is None or not cfg.algorithm.advantage_whiten:
        return []
    return [
        f"algorithm.advantage_whiten: true would whiten once more what {_name(cfg)} whitens over the "
        f"{chosen.whitens} of an update; set it to false"
    ]


def _accumulated(cfg: Config, chosen: Advantage) -> list[str]:
    if cfg.training.updates != "accumulate" or not chosen.needs_whole_update:
        return []
    way_out = "set advantage to one that looks at each group alone, such as group_norm"
    if chosen.of_rewards:
        way_out = (
            "if it looks at each group alone, put @advantage() of r1zero.algo.advantages before it"
        )
    return [
        f"algorithm.advantage: {_name(cfg)} compares the groups of an update, as far as is known, and "
        "training.updates: accumulate learns from the first of them before the last are there; "
        f"{way_out}, or set updates to per_minibatch"
    ]


def _skipped(cfg: Config, chosen: Advantage) -> list[str]:
    if cfg.algorithm.equal_groups != "skip" or chosen.equal_groups_are_zero:
        return []
    return [
        "algorithm.equal_groups: skip leaves groups out whose advantages are 0, which those of "
        f"algorithm.advantage: {_name(cfg)} need not be; set equal_groups to keep, or advantage to "
        "group_norm"
    ]


def _left_out(cfg: Config, chosen: Advantage) -> list[str]:
    """Whitening sees all groups of an update; over those that train the mean would not be 0."""
    algorithm = cfg.algorithm
    whitens = chosen.whitens is not None or algorithm.advantage_whiten
    if algorithm.keep_accuracy is None or algorithm.equal_groups == "replace" or not whitens:
        return []
    return [
        f"algorithm.keep_accuracy: {algorithm.keep_accuracy} leaves groups out of what "
        f"algorithm.advantage: {_name(cfg)} has whitened with them; set equal_groups to replace, or "
        "advantage to one that does not whiten, such as group_norm"
    ]


def _cut(cfg: Config, chosen: Advantage) -> list[str]:
    """What looks at whole groups beside each other must have whole ones in an update."""
    size = cfg.minibatch_size
    group = cfg.actor_rollout.n_samples_per_prompt
    asking = []
    if chosen.compares_groups:
        asking.append(f"algorithm.advantage: {_name(cfg)}")
    if cfg.algorithm.aggregation == "group_token_mean":
        asking.append("algorithm.aggregation: group_token_mean")
    if size % group == 0 or not asking:
        return []
    return [
        f"actor_rollout.ppo_mini_batch_size: {size} must be whole groups of n_samples_per_prompt "
        f"{group} with {asking[0]}, such as {-(-size // group) * group}"
    ]


def _without_verdict(cfg: Config, chosen: Advantage) -> list[str]:
    if "verdict" not in chosen.needs:
        return []
    problems = []
    for source in train_sources(cfg):
        names = list(source.scorers)
        try:
            is_told = gives_verdict(names, cfg.reward.settings)
        except BadInput:
            continue  # told by the check of the reward functions
        if not is_told:
            problems.append(
                f"algorithm.advantage: {_name(cfg)} looks at which responses are right, and no "
                f"function of {source.scorers_key}: {names} says so; name acc, too"
            )
    return problems


def _of_other_functions(cfg: Config, chosen: Advantage) -> list[str]:
    """Scores by function are compared over all groups of an update, so all have the same ones."""
    if "scores" not in chosen.needs:
        return []
    algorithm = cfg.algorithm
    usual = dict(zip(algorithm.verifier_function, algorithm.verifier_weight, strict=False))
    return [
        f"algorithm.advantage: {_name(cfg)} looks at the scores of each function of "
        f"algorithm.verifier_function, and {source.scorers_key} has others; leave it out, or set "
        "advantage to group_norm"
        for source in train_sources(cfg)
        if source.scorers != usual
    ]
