"""Advantages by the formulas of the papers, one response after the other, with plain numpy."""

from __future__ import annotations

from itertools import combinations

import numpy as np

SCORE_WEIGHTS = np.array([1.0, 0.25])  # of the two reward functions of a test


def group_norm(member, rewards, **_):
    if np.ptp(rewards) == 0:
        return 0.0
    return (rewards[member] - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)


def group_mean(member, rewards, **_):
    return rewards[member] - rewards.mean()


def leave_one_out(member, rewards, **_):
    return rewards[member] - np.delete(rewards, member).mean()


def lite_ppo(member, rewards, all_rewards, **_):
    return (rewards[member] - rewards.mean()) / (all_rewards.std(ddof=1) + 1e-6)


def reinforce_pp(member, rewards, **_):
    return rewards[member]


def max_rl(member, rewards, **_):
    return (rewards[member] - rewards.mean()) / rewards.mean() if rewards.mean() > 0 else 0.0


def opo(member, rewards, lengths, **_):
    return rewards[member] - np.average(rewards, weights=lengths)


def gdpo(member, scores, **_):
    own = (scores - scores.mean(0)) / (scores.std(0, ddof=1) + 1e-6)
    return own[member] @ SCORE_WEIGHTS


def pass_at_k(member, right, k=2, **_):
    """The mean of the best over the choices with this member, against that over all choices."""
    choices = list(combinations(range(len(right)), k))
    best = np.array([right[list(choice)].any() for choice in choices], np.float64)
    if best.std() == 0:
        return 0.0
    mine = [value for choice, value in zip(choices, best, strict=True) if member in choice]
    return (np.mean(mine) - best.mean()) / best.std()


def best_only(member, rewards, **_):
    second, best = np.sort(rewards)[-2:]
    gain = (best - second) / (rewards.std(ddof=1) + 1e-6)
    return gain if rewards[member] == best else 0.0


FORMULAS = {
    "group_norm": group_norm,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "lite_ppo": lite_ppo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": group_mean,
    "max_rl": max_rl,
    "opo": opo,
    "gdpo": gdpo,
    "pass_at_k": pass_at_k,
    "best_only": best_only,
}
WHITENED_OVER = {"reinforce_pp": "tokens", "reinforce_pp_baseline": "tokens", "gdpo": "samples"}


def plain_advantages(name, update):
    """The advantages of all samples of an update's groups, by the identity of the sample."""
    samples = [sample for group in update for sample in group.samples]
    all_rewards = np.array([sample.reward for sample in samples])
    found = {}
    for group in update:
        of_group = {
            "rewards": np.array([sample.reward for sample in group.samples]),
            "lengths": np.array([int(sample.mask.sum()) for sample in group.samples]),
            "scores": np.array([sample.score_values for sample in group.samples]),
            "right": np.array([sample.right for sample in group.samples]),
        }
        for member, sample in enumerate(group.samples):
            found[id(sample)] = FORMULAS[name](member, all_rewards=all_rewards, **of_group)
    over = WHITENED_OVER.get(name)
    if over is None:
        return found
    repeats = [int(sample.mask.sum()) if over == "tokens" else 1 for sample in samples]
    values = np.repeat([found[id(sample)] for sample in samples], repeats)
    scale = np.sqrt(values.var(ddof=1) + 1e-8)
    return {key: (value - values.mean()) / scale for key, value in found.items()}
