"""Aggregations: worked values, and weights that do not depend on how an update is cut up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from r1zero.algo.aggregation import AGGREGATIONS, UpdateSamples, check_aggregation, sample_weights
from r1zero.errors import BadInput
from r1zero.preflight.checks import check
from r1zero.preflight.resolve import load_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
OWN = f"{EXAMPLES}/aggregation_square_root.py:square_root"

# Two groups of two; every token of a response has the same loss.
LENGTHS = np.array([2, 4, 1, 3])
GROUPS = np.array([7, 7, 9, 9])
LOSSES = np.array([1.0, 2.0, 3.0, 5.0])
BUDGET = 8


def weights_of(name, counts=LENGTHS, groups=GROUPS):
    return sample_weights(AGGREGATIONS[name], UpdateSamples(counts, groups, BUDGET))


@pytest.mark.parametrize(
    ("name", "expected", "without_the_second"),
    [
        ("token_mean", 28 / 10, 20 / 10),
        ("sequence_mean", 11 / 4, 9 / 4),
        ("sequence_sum", 28 / 4, 20 / 4),
        ("constant", 28 / 32, 20 / 32),
        ("group_token_mean", (10 / 6 + 18 / 4) / 2, (2 / 6 + 18 / 4) / 2),
        (OWN, (2 / 2**0.5 + 8 / 2 + 3 + 15 / 3**0.5) / 4, (2 / 2**0.5 + 3 + 15 / 3**0.5) / 4),
    ],
)
def test_the_loss_by_hand_and_a_response_left_out_takes_only_its_own_terms(
    name, expected, without_the_second
):
    weights, denominator = weights_of(name)
    terms = weights * LENGTHS * LOSSES
    assert terms.sum() / denominator == pytest.approx(expected, rel=1e-12)
    assert (terms.sum() - terms[1]) / denominator == pytest.approx(without_the_second, rel=1e-12)


@pytest.mark.parametrize("name", [*AGGREGATIONS.names(), pytest.param(OWN, id="own")])
def test_parts_of_whole_groups_have_the_same_weights_and_denominators_that_add_up(name):
    random = np.random.default_rng(5)
    counts = random.integers(0, 30, 24)
    groups = np.repeat(random.permutation(6), 4)
    weights, denominator = weights_of(name, counts, groups)
    found = np.zeros(24)
    parts = 0.0
    for part in (groups < 1, (groups >= 1) & (groups < 4), groups >= 4):
        found[part], own = weights_of(name, counts[part], groups[part])
        parts += own
    np.testing.assert_allclose(found, weights, rtol=1e-12)
    assert parts == pytest.approx(denominator, rel=1e-12)


def test_a_response_without_counted_tokens_still_counts_as_one():
    weights, denominator = weights_of("sequence_mean", np.array([2, 0, 1, 3]))
    assert weights.tolist() == [1 / 2, 1, 1, 1 / 3] and denominator == 4


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (lambda samples: np.ones(4), "return a tuple of the weights and the denominator"),
        (lambda samples: (np.ones(3), 1.0), "[1.0, 1.0, 1.0] for 4 samples"),
        (lambda samples: (np.full(4, np.inf), 1.0), "one finite number a sample"),
        (lambda samples: (np.ones(4), 0.0), "the denominator 0.0; return one above 0"),
    ],
)
def test_an_own_aggregation_that_returns_something_else_is_told(own, said):
    with pytest.raises(BadInput) as caught:
        sample_weights(own, UpdateSamples(LENGTHS, GROUPS, BUDGET))
    assert said in str(caught.value)


def test_an_own_aggregation_of_losses_is_told_what_it_takes_now():
    def before(losses, batch):
        return losses.sum() / batch.num_tokens

    with pytest.raises(BadInput, match="mine must take one argument, the UpdateSamples"):
        check_aggregation("mine", before)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("samples.counts * 1.0", "return a tuple of the weights and the denominator"),
        ("samples.lengths, 1.0", "own fails on a trial with two groups: AttributeError"),
        ("1 / samples.counts.clip(0.5), None", "own fails on a trial with two groups: TypeError"),
        ("1 / samples.counts, 4", "one finite number a sample"),
    ],
)
def test_an_own_aggregation_is_tried_before_a_run(tiny, tmp_path, body, said):
    file = tmp_path / "mine.py"
    file.write_text(f"def own(samples):\n    return {body}\n")
    cfg, _ = load_config("tiny", [f"algorithm.aggregation={file}:own"])
    [problem] = check(cfg)
    assert problem.startswith("algorithm.aggregation") and said in problem
