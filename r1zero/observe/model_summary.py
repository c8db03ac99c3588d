"""What the values of the reward model amount to: summed up by each rollout replica, joined by the
controller, as the other sums of samples (sample_summary.py), and told as metrics.

A response that the model could not read has no value, and is in none of these numbers.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction

from r1zero.scores import MODEL
from r1zero.types import Group, ModelSummary, PairSums, Sample

MEAN_KEY = f"reward/{MODEL}"
DEVIATION_KEY = f"reward/{MODEL}/std"
CORRELATION_KEY = f"reward/{MODEL}/correlation/"  # before the name of a reward function
LENGTH_KEY = f"reward/{MODEL}/length_correlation"


def summarize_model(groups: Sequence[Group]) -> ModelSummary | None:
    """Sum up what the reward model said; None when it read none of these samples."""
    samples = [sample for group in groups for sample in group.samples if _is_read(sample, MODEL)]
    if not samples:
        return None
    deviations = [found for found in map(_deviation, groups) if found is not None]
    functions = dict.fromkeys(name for sample in samples for name in sample.scores)
    pairs = {name: _pair_with(name, samples) for name in functions if name != MODEL}
    lengths = [(_value(sample, MODEL), float(sample.length)) for sample in samples]
    return ModelSummary(
        groups=len(deviations),
        deviations=_sum_of_products((each, 1.0) for each in deviations),
        pairs=pairs,
        length=_pair_sums(lengths),
    )


def join_models(parts: Iterable[ModelSummary | None]) -> ModelSummary | None:
    """The summary of all samples, from those of the replicas."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    functions = dict.fromkeys(name for part in found for name in part.pairs)
    pairs = {}
    for name in functions:
        pairs[name] = _join_pairs([part.pairs[name] for part in found if name in part.pairs])
    return ModelSummary(
        groups=sum(part.groups for part in found),
        deviations=sum((part.deviations for part in found), Fraction()),
        pairs=pairs,
        length=_join_pairs([part.length for part in found]),
    )


def model_metrics(found: ModelSummary | None) -> dict[str, float]:
    """What to tell of it. A correlation with what is the same for all samples is none."""
    metrics: dict[str, float] = {}
    if found is None:
        return metrics
    if found.groups:
        metrics[DEVIATION_KEY] = float(found.deviations / found.groups)
    keys = {CORRELATION_KEY + name: pair for name, pair in found.pairs.items()}
    keys[LENGTH_KEY] = found.length
    for key, pair in keys.items():
        correlation = pearson(pair)
        if correlation is not None:
            metrics[key] = correlation
    return metrics


def pearson(sums: PairSums) -> float | None:
    """Pearson's correlation of x and y; None where one of them does not vary."""
    covariance = sums.samples * sums.xy - sums.x * sums.y
    variance_x = sums.samples * sums.xx - sums.x**2
    variance_y = sums.samples * sums.yy - sums.y**2
    if not variance_x or not variance_y:
        return None
    # The square is a fraction from 0 to 1: no value is too large for it, and nothing cancels.
    square = covariance**2 / (variance_x * variance_y)
    return math.copysign(math.sqrt(square), covariance)


def _is_read(sample: Sample, name: str) -> bool:
    """Whether the reward function gave the sample a value that says something about it."""
    score = sample.scores.get(name)
    return score is not None and not score.outcome.failed


def _value(sample: Sample, name: str) -> float:
    return sample.scores[name].value


def _deviation(group: Group) -> float | None:
    """The standard deviation of the model's values in a group, by n - 1; None of fewer than two."""
    values = [_value(sample, MODEL) for sample in group.samples if _is_read(sample, MODEL)]
    if len(values) < 2:
        return None
    return statistics.stdev(values)


def _pair_with(name: str, samples: Sequence[Sample]) -> PairSums:
    """Sums of the model's values with those of another reward function, over samples that have
    both."""
    both = [sample for sample in samples if _is_read(sample, name)]
    return _pair_sums([(_value(sample, MODEL), _value(sample, name)) for sample in both])


def _pair_sums(pairs: Sequence[tuple[float, float]]) -> PairSums:
    return PairSums(
        samples=len(pairs),
        x=_sum_of_products((x, 1.0) for x, _ in pairs),
        y=_sum_of_products((y, 1.0) for _, y in pairs),
        xx=_sum_of_products((x, x) for x, _ in pairs),
        yy=_sum_of_products((y, y) for _, y in pairs),
        xy=_sum_of_products(pairs),
    )


def _sum_of_products(pairs: Iterable[tuple[float, float]]) -> Fraction:
    """The sum of x * y without rounding. Denominators of floats are powers of two, of which there
    are few, so numerators are added as whole numbers: adding fractions takes ten times as long."""
    numerators: Counter[int] = Counter()  # by the denominator
    for x, y in pairs:
        x_numerator, x_denominator = x.as_integer_ratio()
        y_numerator, y_denominator = y.as_integer_ratio()
        numerators[x_denominator * y_denominator] += x_numerator * y_numerator
    parts = (Fraction(numerator, denominator) for denominator, numerator in numerators.items())
    return sum(parts, Fraction())


def _join_pairs(parts: Sequence[PairSums]) -> PairSums:
    return PairSums(
        samples=sum(part.samples for part in parts),
        x=sum((part.x for part in parts), Fraction()),
        y=sum((part.y for part in parts), Fraction()),
        xx=sum((part.xx for part in parts), Fraction()),
        yy=sum((part.yy for part in parts), Fraction()),
        xy=sum((part.xy for part in parts), Fraction()),
    )
