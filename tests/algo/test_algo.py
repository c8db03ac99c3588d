"""KL, loss and its weights against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from support.shapes import small_shape

from r1zero.algo.kl import KLCoefficient, kl_penalty
from r1zero.algo.loss import LossTerms, microbatch_loss
from r1zero.algo.loss_batch import LossBatch
from r1zero.algo.objective import choose_objective
from r1zero.models.config import RopeScaling
from r1zero.models.rotary import inverse_frequencies


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", -0.4),
        ("k2", 0.08),
        ("k3", math.exp(0.4) - 1 - 0.4),
        ("kl", -0.4),
        ("abs", 0.4),
        ("mse", 0.08),
        ("low_var_kl", math.exp(0.4) - 1 - 0.4),
    ],
)
def test_kl_estimators(estimator, expected):
    found = kl_penalty(torch.tensor([-1.5]), torch.tensor([-1.1]), estimator)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_low_var_kl_stays_finite():
    found = kl_penalty(torch.tensor([-200.0, -1.0]), torch.tensor([-1.0, -200.0]), "low_var_kl")
    assert found[0] == 10.0 and found[1] == 10.0


def categorical(seed, tokens=5):
    return torch.randn(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def divergence(logits, ref):
    """KL(policy || reference) of two distributions over all tokens, from its definition."""
    policy = logits.log_softmax(0)
    return (policy.exp() * (policy - ref.log_softmax(0))).sum()


def penalty_in_loss(logits, drawn_by, ref, estimator):
    """The loss of a response whose tokens are all there are, each as often as `drawn_by` draws it;
    nothing to learn."""
    logprobs, nothing = logits.log_softmax(0), torch.zeros_like(logits)
    batch = LossBatch(
        logprobs=logprobs,
        entropy=nothing,
        old_logprobs=drawn_by.log_softmax(0),
        trainer_logprobs=drawn_by.log_softmax(0),
        ref_logprobs=ref.log_softmax(0),
        rollout_logprobs=nothing,
        advantages=nothing,
        mask=drawn_by.softmax(0),
        cu_seqlens=torch.tensor([0, len(logits)], dtype=torch.int32),
        weights=drawn_by.softmax(0),
    )
    return microbatch_loss(batch, grpo(0.2, 0.2), LossTerms(estimator, 1.0, 0.0))[0]


def grpo(low, high):
    return choose_objective(
        "grpo", {}, {"clip_low": low, "clip_high": high}, None, "group_norm", {}
    )


ESTIMATORS = ["kl", "abs", "mse", "low_var_kl", "k1", "k2", "k3"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("seed", range(3))
def test_the_expected_gradient_of_every_estimator_is_that_of_the_kl(estimator, seed):
    logits, ref = categorical(seed).requires_grad_(), categorical(seed + 10)
    [exact] = torch.autograd.grad(divergence(logits, ref), logits)
    loss = penalty_in_loss(logits, logits.detach(), ref, estimator)
    [found] = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)
    if estimator in ("kl", "low_var_kl", "k1", "k3"):  # and these two tell its value without a bias
        assert loss.item() == pytest.approx(divergence(logits, ref).item(), rel=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_tokens_of_older_weights_pull_to_the_reference_too(estimator):
    """Later minibatches of a step: an older policy drew, and what is learned from still has the
    reference as its goal."""
    old, ref = categorical(1), categorical(2)
    at_goal = ref.clone().requires_grad_()
    [found] = torch.autograd.grad(penalty_in_loss(at_goal, old, ref, estimator), at_goal)
    torch.testing.assert_close(found, torch.zeros_like(ref), rtol=0, atol=1e-14)
    logits = old.clone().requires_grad_()
    for _ in range(400):
        [gradient] = torch.autograd.grad(penalty_in_loss(logits, old, ref, estimator), logits)
        logits.data -= gradient
    assert divergence(logits, ref) < 1e-6 * divergence(old, ref)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_learning_from_drawn_tokens_brings_the_policy_back(estimator):
    """64 tokens a step from the policy itself, as in training: what is left after 300 steps is the
    noise of one."""
    random = torch.Generator().manual_seed(3)
    logits, ref = categorical(4).requires_grad_(), categorical(7)
    before = divergence(logits, ref).item()
    for _ in range(300):
        logprobs = logits.log_softmax(0)
        drawn = torch.multinomial(logprobs.detach().exp(), 64, replacement=True, generator=random)
        kl_penalty(logprobs[drawn], ref.log_softmax(0)[drawn], estimator).mean().backward()
        with torch.no_grad():
            logits -= 0.3 * logits.grad
        logits.grad = None
    assert before > 0.3 and divergence(logits, ref).item() < 0.01 * before


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("d", [200.0, -200.0])
def test_a_token_far_from_the_reference_is_pulled_but_does_not_drown_the_others(estimator, d):
    logprobs = torch.tensor([-1.0], requires_grad=True)
    kl_penalty(logprobs, torch.tensor([-1.0 - d]), estimator).backward()
    assert logprobs.grad.item() == math.copysign(20.0, d)


def test_adaptive_coefficient_follows_its_target_and_a_fixed_one_stays():
    fixed, adaptive = KLCoefficient(0.05), KLCoefficient(0.05, target=0.1, horizon=1000)
    fixed.update(9.0, 100)
    assert fixed.value == 0.05
    fixed.restore(0.3)
    assert (fixed.value, fixed.kept) == (0.05, None), "a checkpoint says nothing about it"
    adaptive.update(0.11, 100)  # 10% above the target, 100 of 1000 samples: 1% up
    assert adaptive.value == pytest.approx(0.05 * 1.01)
    adaptive.update(5.0, 100)  # errors are held to 20%: 2% up
    assert adaptive.value == pytest.approx(0.05 * 1.01 * 1.02)
    short = KLCoefficient(0.05, target=0.1, horizon=10)
    short.update(0.0, 600)  # 60 horizons of 20% down each would be below zero: it falls by one
    assert short.value == pytest.approx(0.04)


def loss_of(ratio, advantage, mask=1.0, denominator=1):
    """GRPO clipped to [0.8, 1.3] of one token; returns its log-prob, the loss and the
    statistics."""
    one = torch.ones(1)
    logprobs = torch.tensor([math.log(ratio) - 2.0], requires_grad=True)
    batch = LossBatch(
        logprobs=logprobs,
        entropy=3 * one,
        old_logprobs=-2 * one,
        trainer_logprobs=-2 * one,
        ref_logprobs=-2.5 * one,
        rollout_logprobs=-2.25 * one,
        advantages=advantage * one,
        mask=mask * one,
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        weights=mask * one / denominator,
    )
    objective = grpo(0.2, 0.3)
    loss, sums = microbatch_loss(batch, objective, LossTerms("kl", 0.1, 0.01))
    tallies = sums.tallies(objective.loss.all_stats)
    return (
        logprobs,
        loss,
        {key: tally.total for key, tally in tallies.items()} | {"tokens": sums.tokens},
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "clipped"),
    [
        # the upper clip only bounds gains
        (1.1, 2.0, -2.2, 0),
        (1.5, 2.0, -2.6, 1),
        (1.5, -2.0, 3.0, 0),
        (0.5, 2.0, -1.0, 0),
        (0.5, -2.0, 1.6, 1),
    ],
)  # and the lower one only bounds them for bad samples
def test_loss_clips_each_side_by_hand(ratio, advantage, surrogate, clipped):
    _, loss, stats = loss_of(ratio, advantage)
    kl = math.log(ratio) - 2.0 + 2.5
    assert loss.item() == pytest.approx(surrogate + 0.1 * kl - 0.01 * 3, rel=1e-5)
    side = "high" if ratio > 1 else "low"
    assert stats[f"clip_fraction/{side}"] == clipped
    assert stats["clip_fraction"] == clipped and stats["tokens"] == 1 and stats["entropy"] == 3
    assert stats["mismatch/mean"] == stats["mismatch/max"] == pytest.approx(0.25) and stats[
        "kl"
    ] == pytest.approx(kl, rel=1e-5)


def test_masked_tokens_have_no_part_and_the_weight_multiplies():
    logprobs, loss, stats = loss_of(1.1, 2.0, mask=0.0)
    loss.backward()
    assert loss.item() == 0 and logprobs.grad.item() == 0 and not any(stats.values())
    assert loss_of(1.1, 2.0, denominator=8)[1].item() == pytest.approx(
        loss_of(1.1, 2.0)[1].item() / 8
    )


def test_llama3_rope_equals_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=256, num_attention_heads=2, rope_theta=500000.0, rope_scaling=scaling
        )
    )
    shape = small_shape(
        family="llama",
        num_layers=1,
        hidden_size=256,
        num_heads=2,
        head_dim=128,
        max_positions=131072,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        norm_eps=1e-5,
        tie_word_embeddings=False,
        qkv_bias=False,
    )
    torch.testing.assert_close(inverse_frequencies(shape), theirs.inv_freq, rtol=1e-6, atol=0)
