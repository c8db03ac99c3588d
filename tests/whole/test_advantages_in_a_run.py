"""Runs whose advantages need more than rewards: it comes from the rollout ranks to the train ranks."""

from __future__ import annotations

import numpy as np
import pytest
from support.plain_advantages import pass_at_k
from support.scripted_verdicts import write_data
from support.worlds import SHORT, run, samples

GROUP = 4
ONE_STEP = [*SHORT, "training.train_iters=1"]


def column(rows, name):
    """Of all samples of a step, [groups, G]."""
    return np.array([row[name] for row in rows], np.float64).reshape(-1, GROUP)


@pytest.mark.parametrize("size", [1, 4])
def test_scores_of_each_reward_function_are_normalised_by_themselves(tiny, tmp_path, size):
    functions = ["acc", "length", "repetition"]
    weights = np.array([1.0, 0.5, 0.25])
    keys = [
        "algorithm.advantage=gdpo",
        f"algorithm.verifier_function={functions}",
        f"algorithm.verifier_weight={weights.tolist()}",
    ]
    rows = samples(run(tmp_path / "run", size, "tiny", [*ONE_STEP, *keys]), 1)
    total = np.zeros((len(rows) // GROUP, GROUP))
    for weight, name in zip(weights, functions, strict=True):
        scores = column(rows, f"score/{name}")
        gain = scores - scores.mean(1, keepdims=True)
        total += weight * gain / (scores.std(1, ddof=1, keepdims=True) + 1e-6)
    assert total.any()
    expected = (total - total.mean()) / np.sqrt(total.var(ddof=1) + 1e-8)
    # where scores are equal, the rounding of their mean is divided by 1e-6 here, and left out there
    np.testing.assert_allclose(column(rows, "advantage"), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1, 4])
def test_verdicts_decide_alone_where_pass_at_k_is_the_goal(tiny, tmp_path, size):
    rights = [4, 2, 0, 1]
    data = write_data(tmp_path / "data.parquet", tiny, rights)
    keys = ["algorithm.advantage=pass_at_k", "algorithm.advantage_settings.k=2"]
    rows = samples(run(tmp_path / "run", size, "tiny", [*ONE_STEP, *data, *keys]), 1)
    right = column(rows, "reward") > 0
    assert right.sum(1).tolist() == rights
    expected = [[pass_at_k(member, group) for member in range(GROUP)] for group in right]
    np.testing.assert_allclose(column(rows, "advantage"), expected, rtol=1e-9, atol=1e-12)
