"""Custom reward functions: `package.module:function` or `path/to/file.py:function`.

Only the processes of the reward executor load and call them; whatever they do there, the run goes
on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real

from r1zero.config.own_code import load_own
from r1zero.reward.types import RewardInput

KEY = "algorithm.verifier_function"


def grade(name: str, cases: Sequence[RewardInput]) -> list[float]:
    """Call a custom scorer. TypeError or ValueError when it does not return one finite number per
    case."""
    values = load_own(KEY, name)(cases)
    if not isinstance(values, Iterable):
        raise TypeError(
            f"{name} returned a {type(values).__name__}, not a list of {len(cases)} numbers"
        )
    values = list(values)
    if len(values) != len(cases):
        raise ValueError(f"{name} returned {len(values)} values for {len(cases)} responses")
    for at, value in enumerate(values):
        if not isinstance(value, Real):
            raise TypeError(f"{name} returned {value!r:.80} for response {at}, which is no number")
        if not math.isfinite(value):
            raise ValueError(f"{name} returned {value} for response {at}; values must be finite")
    return [float(value) for value in values]
