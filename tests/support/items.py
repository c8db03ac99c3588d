"""Samples as the update takes them."""

from __future__ import annotations

import numpy as np

from r1zero.algo.packing import TrainSample
from r1zero.types import Prompt, Sample


def item(number, position, prompt, response):
    tokens = np.array(response, dtype=np.int32)
    return TrainSample(
        number,
        position,
        Prompt(position, "", np.array(prompt, dtype=np.int32), ""),
        Sample(tokens, np.zeros(len(tokens), np.float32), False, 0),
    )


def random_items(count=9, seed=0):
    random = np.random.default_rng(seed)
    return [
        item(
            i,
            i // 3,
            random.integers(1, 99, [5, 1, 12][i // 3]),
            random.integers(1, 99, random.integers(1, 9)),
        )
        for i in range(count)
    ]
