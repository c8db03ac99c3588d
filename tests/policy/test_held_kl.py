"""A large coefficient holds the KL of a run, whatever is told as the KL and wherever the term stands."""

from __future__ import annotations

import numpy as np
import pytest
from support.multiproc import run_ranks
from support.worlds import make_runtime

from r1zero.algo.kl import OLDER_NAMES
from r1zero.step import train_step

STEPS = 12
# The KL of the third tells what the second update made of the term, the first that is not 0 there.
FEW = 3


def held_body(rank, size, store, folder, steps, *overrides):
    """So many steps of one update each; returns the KL of each by d^2 / 2 over its samples, before its
    update."""
    runtime = make_runtime(
        store,
        folder,
        "training.global_batch_size=4",
        "actor_rollout.ppo_mini_batch_size=32",
        "actor_rollout.lr_decay_style=constant",
        *overrides,
    )
    runtime.start()
    found = []
    for step in range(1, steps + 1):
        train_step(step, runtime)
        samples = [s for delivery in runtime.policy._deliveries for s in delivery.samples.values()]
        d = np.concatenate([sample.logprobs - sample.ref_logprobs for sample in samples])
        found.append(float(np.mean(d**2) / 2))
        runtime.progress.advance(runtime.drawn)
    return found


def kl_of(tmp_path, steps, *overrides):
    """The KL of each step."""
    [found] = run_ranks(held_body, 1, str(tmp_path), steps, *overrides)
    return found


def last_third(found):
    return float(np.mean(found[-STEPS // 3 :]))


def test_without_the_term_the_policy_leaves_the_reference(tiny, tmp_path):
    """Else the test below would say nothing."""
    assert last_third(kl_of(tmp_path, STEPS, "algorithm.kl_ctrl.kl_coef=0")) > 0.03


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_a_coefficient_of_5_holds_the_kl_below_a_hundredth(tiny, tmp_path, place):
    """By each estimator, since all have one gradient: the same numbers to the last bit. Older names are
    these: tests/algo/test_algo.py."""
    assert set(OLDER_NAMES.values()) < {"k1", "k2", "k3", "abs"}
    keys = [f"algorithm.kl_in={place}", "algorithm.kl_ctrl.kl_coef=5"]
    held = kl_of(tmp_path, STEPS, "algorithm.kl_penalty=k3", *keys)
    assert last_third(held) < 0.01
    for estimator in ("k1", "k2", "abs"):
        assert kl_of(tmp_path, FEW, f"algorithm.kl_penalty={estimator}", *keys) == held[:FEW]
