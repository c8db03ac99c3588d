"""Estimators of evaluation: pass@k, and how far it would move with other problems."""

from __future__ import annotations

import numpy as np

_CHUNK = 500  # resamples at a time, so that memory stays small


def pass_at_k(right: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Estimate for each problem the probability that at least one of k answers is right, fp64
    [problems].

    `right` [problems] counts the right ones of `samples` >= k answers. Unbiased: 1 - C(n - c, k) /
    C(n, k) (Chen et al. 2021, arXiv:2107.03374, eq. 1), as the product of (n - c - j) / (n - j)
    over j < k. For k = 1 it is the mean accuracy, avg@n.
    """
    assert 1 <= k <= samples
    misses = np.ones(len(right))
    for j in range(k):
        misses *= np.maximum(samples - right - j, 0) / (samples - j)
    return 1.0 - misses


def bootstrap_interval(
    values: np.ndarray, seed: int, level: float = 0.95, resamples: int = 10_000
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of `values` [problems], drawn anew with
    replacement.

    Problems are drawn, not answers: it says what another set of such problems might have given.
    """
    size = len(values)
    bits = np.random.Philox(key=[seed, size])  # raw bits are the same in every release of numpy
    means = np.concatenate(
        [
            values[(bits.random_raw((count, size)) % np.uint64(size)).astype(np.int64)].mean(axis=1)
            for count in [_CHUNK] * (resamples // _CHUNK)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
