"""From the values of a reward model to its part of the reward. Pure.

The level of a reward model's values means nothing, as a rule: it was trained on differences. So by
default they are taken against the values of the same group (DeepSeekMath, arXiv:2402.03300, section
4.1.2, outcome supervision):

    scaled_i = (v_i - mean(v)) / (std(v) + EPSILON)     std with n - 1; 0 where all are equal

With `fixed` the mean and the deviation are those of the configuration, with `none` the value counts as
it is. Then no value is further than `clip` from 0.

The values 1, none and 4 of a group have the mean 2 and the deviation sqrt(3), since what has no value
is taken to be the worst of its group: -0.577, -0.577 and 1.155.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

EPSILON = 1e-6  # added to the deviation of a group
# Values of a group that differ by less, against the largest of them or 1, differ by rounding alone.
ROUNDING = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """How a reward model's values become rewards."""

    normalize: Literal["group", "fixed", "none"]
    mean: float  # of `fixed`
    std: float
    clip: float | None
    weight: float
    with_rules: bool  # beside the reward functions, else in their place

    def parts(self, values: Sequence[float | None]) -> list[float]:
        """What the values of a group add to the rewards of its samples: see `scaled`."""
        return [self.weight * value for value in self.scaled(values)]

    def scaled(self, values: Sequence[float | None]) -> list[float]:
        """The values of a group as they count, before the weight.

        None stands for no value: such a sample gets what the worst of its group gets, and 0 where none
        has a value.
        """
        known = [value for value in values if value is not None]
        if not known:
            return [0.0] * len(values)
        worst = min(known)
        found = self._normalized([worst if value is None else value for value in values])
        if self.clip is None:
            return found
        return [max(-self.clip, min(self.clip, value)) for value in found]

    def _normalized(self, values: Sequence[float]) -> list[float]:
        if self.normalize == "none":
            return list(values)
        if self.normalize == "fixed":
            return [(value - self.mean) / self.std for value in values]
        mean = fmean(values)
        if max(values) - min(values) <= ROUNDING * max(1.0, *map(abs, values)):
            return [0.0] * len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        return [(value - mean) / (math.sqrt(variance) + EPSILON) for value in values]
