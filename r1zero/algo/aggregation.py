"""Aggregation (loss reduction): how much each sample of an update weighs in its loss.

    loss = sum over samples i (c_i * sum over its tokens of their loss),   c_i = weight_i / denominator

The c_i are known before the first forward pass and belong to the whole update, over all ranks: so
microbatches, packing and replicas change nothing. An aggregation is a pure function
UpdateSamples -> (weights, denominator). It may be asked for whole groups of an update at a time;
the denominators of the parts are then added up.

All samples of the update are in the denominator, also those that the loss leaves out: to leave one
out takes its terms away and changes no other's weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from r1zero.config.registry import Table
from r1zero.errors import BadInput


@dataclass(frozen=True, slots=True)
class UpdateSamples:
    """The n samples that one update learns from, as far as their weights depend on them."""

    counts: np.ndarray  # int64 [n], response tokens of each that its loss mask leaves
    groups: np.ndarray  # int64 [n], the group of each: its position in the batch
    budget: int  # tokens that a response may have

    def group_sums(self, values: np.ndarray) -> np.ndarray:
        """The sum over the group of each sample: [n] -> [n]."""
        _, group_of_sample = np.unique(self.groups, return_inverse=True)
        return np.bincount(group_of_sample, values)[group_of_sample]

    @property
    def num_groups(self) -> int:
        return len(np.unique(self.groups))


# Weights, float64 [n], and the denominator.
Weights: TypeAlias = tuple[np.ndarray, float]
Aggregation: TypeAlias = Callable[[UpdateSamples], Weights]

AGGREGATIONS: Table[Aggregation] = Table("algorithm.aggregation")
DEFAULT = "token_mean"


@AGGREGATIONS.add
def token_mean(samples: UpdateSamples) -> Weights:
    """All tokens weigh the same, so long responses more (DAPO, arXiv:2503.14476, section 3.3)."""
    return np.ones(len(samples.counts)), samples.counts.sum()


@AGGREGATIONS.add
def sequence_mean(samples: UpdateSamples) -> Weights:
    """All responses weigh the same: means over tokens first (GRPO, arXiv:2402.03300, eq. 3)."""
    return 1 / np.maximum(samples.counts, 1), len(samples.counts)


@AGGREGATIONS.add
def sequence_sum(samples: UpdateSamples) -> Weights:
    """Sums over tokens, mean over responses: the policy gradient itself (RLOO, arXiv:2402.14740)."""
    return np.ones(len(samples.counts)), len(samples.counts)


@AGGREGATIONS.add
def constant(samples: UpdateSamples) -> Weights:
    """Sums over tokens, divided by the response budget (Dr. GRPO, arXiv:2503.20783, section 3.2)."""
    return np.ones(len(samples.counts)), len(samples.counts) * samples.budget


@AGGREGATIONS.add
def group_token_mean(samples: UpdateSamples) -> Weights:
    """All groups weigh the same: means over the tokens of each first (DAPO, arXiv:2503.14476, eq. 8;
    the prompt average of ScaleRL, arXiv:2510.13786)."""
    tokens = samples.group_sums(samples.counts)
    return 1 / np.maximum(tokens, 1), samples.num_groups


def sample_weights(aggregation: Aggregation, samples: UpdateSamples) -> Weights:
    """What the aggregation says, checked. BadInput when an own one returns something else."""
    returned = aggregation(samples)
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise BadInput(
            f"algorithm.aggregation returned {returned!r:.80}; return a tuple of the weights and the "
            "denominator"
        )
    weights, denominator = returned
    weights = np.asarray(weights, np.float64)
    wanted = samples.counts.shape
    if weights.shape != wanted or not np.isfinite(weights).all():
        raise BadInput(
            f"algorithm.aggregation returned the weights {weights.tolist()} for "
            f"{len(samples.counts)} samples; return one finite number a sample"
        )
    divides = denominator > 0 or not samples.counts.any()
    if not np.isfinite(denominator) or not divides:
        raise BadInput(
            f"algorithm.aggregation returned the denominator {denominator}; return one above 0"
        )
    return weights, float(denominator)


def check_aggregation(name: str, found: Callable[..., Any]) -> None:
    """BadInput for an own function that cannot be called with UpdateSamples alone."""
    try:
        inspect.signature(found).bind("samples")
    except ValueError:
        return  # of some functions written in C no signature is known
    except TypeError:
        raise BadInput(
            f"algorithm.aggregation: {name} must take one argument, the UpdateSamples, and return "
            "their weights and the denominator: see docs/extending.md"
        ) from None


def try_aggregation(name: str, found: Aggregation) -> None:
    """Call it with responses that could be of a run, one of them without counted tokens. BadInput
    if it fails on them."""
    counts = np.array([8, 3, 0, 5])
    groups = np.array([0, 0, 1, 1])
    try:
        sample_weights(found, UpdateSamples(counts, groups, budget=8))
    except BadInput:
        raise
    except Exception as error:  # noqa: BLE001 - code of the user: anything may happen
        raise BadInput(
            f"algorithm.aggregation: {name} fails on a trial with two groups: "
            f"{type(error).__name__}: {error}"
        ) from None
