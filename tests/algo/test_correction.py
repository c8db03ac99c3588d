"""Correction of the mismatch with the rollout engine: weights by hand, and what they reach."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.loss_batches import loss_batch, objective_with

from r1zero.algo.correction import correction_weights
from r1zero.algo.loss import LossTerms, microbatch_loss
from r1zero.config.load import dump
from r1zero.config.schema import Correction
from r1zero.preflight.checks import check
from r1zero.preflight.resolve import load_config

# w = e^0.3 = 1.349859 and e^-0.1 = 0.904837; their geometric mean is e^0.1 = 1.105171.
OLD = [-1.0, -2.0]
ENGINE = [-1.3, -1.9]


@pytest.mark.parametrize(
    ("correction", "stale", "weights", "bounded"),
    [
        (Correction(), False, [1, 1], [0, 0]),
        (Correction(cap=1.2), True, [1.2, 0.904837], [1, 0]),
        (Correction(weights="clip", cap=1.2), False, [1.2, 0.904837], [1, 0]),
        (Correction(weights="none", cap=1.2), True, [1, 1], [0, 0]),
        (Correction(weights="mask", low=0.8, high=1.25), False, [0, 0.904837], [1, 0]),
        (Correction(weights="mask", low=0.95, high=1.4), False, [1.349859, 0], [0, 1]),
    ],
)
def test_weights_of_tokens_by_hand(correction, stale, weights, bounded):
    batch = loss_batch(OLD, OLD, [1.0, 1.0], [2], rollout=ENGINE)
    found = correction_weights(batch, correction, stale)
    torch.testing.assert_close(found.values.tolist(), [*map(float, weights)], rtol=1e-5, atol=0)
    assert found.bounded.tolist() == [*map(bool, bounded)] and not found.rejected.any()
    assert not found.values.requires_grad


@pytest.mark.parametrize(
    ("correction", "rejected"),
    [
        (Correction(reject="sequence", reject_low=0.9, reject_high=1.11), False),
        (Correction(reject="sequence", reject_low=0.9, reject_high=1.1), True),
        (Correction(reject="sequence", reject_low=1.0, reject_high=1.2), False),
        (Correction(reject="token", veto=0.9), False),
        (Correction(reject="token", veto=0.91), True),
    ],
)
def test_a_response_is_rejected_as_a_whole_and_the_other_stays(correction, rejected):
    """The second response of one token has w = 1."""
    batch = loss_batch([*OLD, -3.0], [*OLD, -3.0], [1.0] * 3, [2, 1], rollout=[*ENGINE, -3.0])
    found = correction_weights(batch, correction, stale=False)
    assert found.rejected.tolist() == [rejected, rejected, False]
    assert found.values.tolist() == [0.0 if rejected else 1.0] * 2 + [1.0]


def test_masked_tokens_reject_nothing():
    batch = loss_batch(OLD, OLD, [1.0] * 2, [2], rollout=[-9.0, -2.0], mask=[0.0, 1.0])
    for correction in (
        Correction(reject="sequence"),
        Correction(reject="token", veto=0.5),
    ):
        assert not correction_weights(batch, correction, stale=False).rejected[1]


def test_mismatch_by_hand_whatever_is_corrected():
    """Means over both tokens: of w 1.127348, of w - 1 - log w 0.027348; of |log w| 0.2; the mean of
    the response is 0.1."""
    batch = loss_batch(OLD, OLD, [1.0, 1.0], [2], rollout=ENGINE)
    for correction in (Correction(), Correction(weights="mask", low=1.0, high=1.0)):
        found = tallies(batch, LossTerms("k3", 0.0, 0.0, correction=correction))
        assert found["mismatch/kl"] / 2 == pytest.approx(0.027348, abs=1e-6)
        assert found["importance/ratio"] / 2 == pytest.approx(1.127348, rel=1e-6)
        assert found["mismatch/mean"] / 2 == pytest.approx(0.2)
        assert found["mismatch/sequence"] == pytest.approx(0.1)


def test_counts_and_mean_weight_are_measured():
    batch = loss_batch([*OLD, -3.0], [*OLD, -3.0], [1.0] * 3, [2, 1], rollout=[*ENGINE, -3.0])
    correction = Correction(weights="clip", cap=1.2, reject="token", veto=0.91)
    found = tallies(batch, LossTerms("k3", 0.0, 0.0, correction=correction))
    assert found["importance/truncated"] == 1 and found["importance/rejected"] == 1
    assert found["importance/mean"] == 1.0


def tallies(batch, terms):
    objective = objective_with("grpo")
    _, sums = microbatch_loss(batch, objective, terms)
    return {key: tally.total for key, tally in sums.tallies(objective.loss.all_stats).items()}


def gradient_of(batch, correction, kl=0.0):
    """With respect to the log-probs; p is above p_old, and the reference below both."""
    terms = LossTerms("k3", kl, 0.0, correction=correction)
    loss, _ = microbatch_loss(batch, objective_with("reinforce"), terms)
    return torch.autograd.grad(loss, batch.logprobs)[0]


def test_weights_reach_the_policy_loss_alone_and_have_no_gradient():
    """The first update on these tokens: p_old is p itself, so that a weight that was not detached
    would bring a gradient of its own."""
    batch = loss_batch(OLD, OLD, [1.0, 2.0], [2], rollout=ENGINE, ref=[-1.5, -1.5])
    attached = replace(batch, trainer_logprobs=batch.logprobs, old_logprobs=batch.logprobs)
    plain = gradient_of(batch, Correction())
    weights = torch.tensor([1.2, 0.904837])
    capped = Correction(weights="clip", cap=1.2)
    for each in (batch, attached):
        torch.testing.assert_close(gradient_of(each, capped), weights * plain, rtol=1e-5, atol=0)
    with_kl = gradient_of(batch, capped, kl=0.3)
    kl_alone = gradient_of(batch, Correction(), kl=0.3) - plain
    torch.testing.assert_close(with_kl, weights * plain + kl_alone, rtol=1e-5, atol=1e-7)


def test_a_rejection_only_removes():
    """What the other response adds to the gradient is as large as without it."""
    batch = loss_batch([*OLD, -3.0], [*OLD, -3.0], [1.0] * 3, [2, 1], rollout=[*ENGINE, -3.0])
    plain = gradient_of(batch, Correction())
    found = gradient_of(batch, Correction(reject="token", veto=0.91))
    assert found.tolist() == [0.0, 0.0, plain[2].item()]


# -- what a configuration may say -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"), [("weights", "clip"), ("weights", "mask"), ("reject", "token")]
)
def test_there_is_nothing_to_correct_where_the_ratio_goes_to_the_engine(tiny, key, value):
    keys = ["algorithm.old_logprobs=rollout", f"algorithm.correction.{key}={value}"]
    [problem] = check(load_config("tiny", keys)[0])
    assert f"algorithm.correction.{key}: {value}" in problem and "old_logprobs" in problem
    stale = ["algorithm.old_logprobs=rollout", "training.staleness=1"]
    assert check(load_config("tiny", stale)[0]) == []


def test_a_correction_comes_back_from_a_dump(tiny, tmp_path):
    cfg, _ = load_config(
        "tiny", ["algorithm.correction={weights: mask, low: 0.7, reject: sequence}"]
    )
    assert check(cfg) == []
    (tmp_path / "dumped.yaml").write_text(dump(cfg))
    again, _ = load_config(str(tmp_path / "dumped.yaml"))
    assert again.algorithm.correction == cfg.algorithm.correction
    assert again.algorithm.correction.low == 0.7
