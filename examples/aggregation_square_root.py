"""An own aggregation: sums over tokens divided by the square root of their number.

Between `sequence_sum`, where long responses weigh as much more as they are longer, and
`sequence_mean`, where all weigh the same.

algorithm:
  aggregation: examples/aggregation_square_root.py:square_root
"""

from __future__ import annotations

import numpy as np

from r1zero.algo.aggregation import UpdateSamples


def square_root(samples: UpdateSamples) -> tuple[np.ndarray, float]:
    """The weight of each sample, float64 [n], and what the sum of their losses is divided by."""
    return 1 / np.sqrt(np.maximum(samples.counts, 1)), len(samples.counts)
