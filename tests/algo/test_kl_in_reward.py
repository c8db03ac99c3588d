"""The KL term in the reward of each token against that in the loss."""

from __future__ import annotations

import pytest
import torch
from support.loss_batches import loss_batch, objective_with, with_sequence_mean

from r1zero.algo.loss import LossTerms, microbatch_loss
from r1zero.algo.losses import LOSSES

OLD = [-1.0, -2.0, -0.5]
REF = [-1.5, -1.2, -40.0]  # the last is held to a log-ratio of 20
ADVANTAGES = [2.0, 2.0, -1.0]


def gradient_of(objective, place, logprobs=OLD, aggregation="token_mean"):
    batch = loss_batch(logprobs, OLD, ADVANTAGES, [2, 1], ref=REF, aggregation=aggregation)
    loss, sums = microbatch_loss(batch, objective, LossTerms("k3", 0.3, 0.0, place))
    [gradient] = torch.autograd.grad(loss, batch.logprobs)
    return gradient, sums.tallies(objective.loss.all_stats)


@pytest.mark.parametrize("loss", LOSSES.names())
def test_on_policy_both_places_have_the_same_gradient_at_each_token(loss):
    objective = with_sequence_mean(loss)
    in_loss, told = gradient_of(objective, "loss", aggregation="sequence_mean")
    in_reward, same = gradient_of(objective, "reward", aggregation="sequence_mean")
    torch.testing.assert_close(in_reward, in_loss, rtol=1e-5, atol=1e-6)
    assert told["kl"] == same["kl"], "what is told does not depend on the place"


def test_the_advantage_of_a_token_is_less_by_its_log_ratio_and_ratios_weigh_it():
    """-A' r / 3 with A' = A - 0.3 d, no bound reached: d = 0.6, -0.8 and 20, of the policy now."""
    moved = [-0.9, -2.0, -0.5]
    found, _ = gradient_of(objective_with("grpo"), "reward", moved)
    first = -(2 - 0.3 * 0.6) * 1.105171 / 3
    expected = torch.tensor([first, -(2 + 0.3 * 0.8) / 3, -(-1 - 0.3 * 20) / 3])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
