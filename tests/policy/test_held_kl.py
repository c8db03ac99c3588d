"""A large coefficient holds the KL of a run, whatever is told as the KL and wherever the term stands."""

from __future__ import annotations

import numpy as np
import pytest
from support.multiproc import run_ranks
from support.worlds import make_runtime

from r1zero.algo.kl import OLDER_NAMES
from r1zero.step import train_step

STEPS = 12


def held_body(rank, size, store, folder, *overrides):
    """Steps of one update each; returns the KL of each by d^2 / 2 over its samples, before its
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
    for step in range(1, STEPS + 1):
        train_step(step, runtime)
        samples = [s for delivery in runtime.policy._deliveries for s in delivery.samples.values()]
        d = np.concatenate([sample.logprobs - sample.ref_logprobs for sample in samples])
        found.append(float(np.mean(d**2) / 2))
        runtime.progress.advance(runtime.drawn)
    return found


def last_third(tmp_path, *overrides):
    """Mean KL of the last third of the steps."""
    [found] = run_ranks(held_body, 1, str(tmp_path), *overrides)
    return float(np.mean(found[-STEPS // 3 :]))


def test_without_the_term_the_policy_leaves_the_reference(tiny, tmp_path):
    """Else the test below would say nothing."""
    assert last_third(tmp_path, "algorithm.kl_ctrl.kl_coef=0") > 0.03


@pytest.mark.parametrize("place", ["loss", "reward"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_a_coefficient_of_5_holds_the_kl_below_a_hundredth(tiny, tmp_path, estimator, place):
    """Older names of estimators are these: tests/algo/test_algo.py."""
    assert set(OLDER_NAMES.values()) < {"k1", "k2", "k3", "abs"}
    held = last_third(
        tmp_path,
        f"algorithm.kl_penalty={estimator}",
        f"algorithm.kl_in={place}",
        "algorithm.kl_ctrl.kl_coef=5",
    )
    assert held < 0.01
