"""Built-in policy losses: values, gradients and what was cut, worked by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from support.loss_batches import CLIP, loss_batch, objective_with, with_sequence_mean
from support.npu_kernels import missing_kernels
from torch.utils._python_dispatch import TorchDispatchMode

from r1zero.algo.loss import LossTerms, microbatch_loss
from r1zero.algo.losses import LOSSES
from r1zero.config.schema import Correction
from r1zero.preflight.cautions import cautions
from r1zero.preflight.checks import check
from r1zero.preflight.resolve import load_config

NO_TERMS = LossTerms("k3", 0.0, 0.0)

# Two tokens with the ratios e^0.2 = 1.221403 and e^-0.4 = 0.670320; of the sequence e^-0.1 = 0.904837.
# For A = 1 and A = -1: the loss of each token, its gradient, tokens cut low and high.
BY_HAND = [
    (
        "dual_clip",
        CLIP | {"clip_dual": 1.1},
        ([-1.2, -0.670320], [0, -0.670320], [0, 0], [1, 0]),
        # 1.1 bounds the first; the second is below 1 - 0.2
        ([1.1, 0.8], [0, 0], [0, 1], [1, 0]),
    ),
    (
        "dual_clip",
        CLIP,
        ([-1.2, -0.670320], [0, -0.670320], [0, 0], [1, 0]),
        ([1.221403, 0.8], [1.221403, 0], [0, 1], [0, 0]),
    ),
    (
        "grpo",
        CLIP,
        ([-1.2, -0.670320], [0, -0.670320], [0, 0], [1, 0]),
        ([1.221403, 0.8], [1.221403, 0], [0, 1], [0, 0]),
    ),
    (
        "gspo",
        {},
        ([-0.904837] * 2, [-0.904837] * 2, [0, 0], [0, 0]),
        ([0.9997] * 2, [0, 0], [1, 1], [0, 0]),
    ),
    (
        "sapo",
        {},
        ([-2.220503, -1.673274], [-1.206556, -0.652431], None, None),
        ([2.125173, 1.578335], [1.205048, 0.650633], None, None),
    ),
    (
        "gmpo",
        {"clip_log": 0.4001},  # the second lies at 0.4, up to rounding
        ([-0.904837] * 2, [-0.904837] * 2, [0, 0], [0, 0]),
        ([0.904837] * 2, [0.904837] * 2, [0, 0], [0, 0]),
    ),
    (
        "gmpo",
        {"clip_log": 0.1},
        # the mean of 0.1 and -0.4 is -0.15, that of 0.2 and -0.1 is 0.05
        ([-0.860708] * 2, [0, -0.860708], [0, 0], [1, 0]),
        ([1.051271] * 2, [1.051271, 0], [0, 1], [0, 0]),
    ),
    (
        "reinforce",
        {},
        ([0.8, 2.4], [-1, -1], None, None),
        ([-0.8, -2.4], [1, 1], None, None),
    ),
]


@pytest.mark.parametrize(("loss", "settings", "good", "bad"), BY_HAND)
def test_losses_gradients_and_cuts_by_hand(loss, settings, good, bad):
    settings = LOSSES[loss].settings(settings, {})
    for advantage, (values, gradient, low, high) in ((1.0, good), (-1.0, bad)):
        batch = loss_batch([-0.8, -2.4], [-1.0, -2.0], [advantage] * 2, [2])
        losses, measured = LOSSES[loss](batch, **settings)
        [slope] = torch.autograd.grad(losses.sum(), batch.logprobs)
        torch.testing.assert_close(losses.tolist(), values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(slope.tolist(), [*map(float, gradient)], rtol=1e-5, atol=1e-6)
        if low is not None:
            either = [float(one or other) for one, other in zip(low, high, strict=True)]
            assert measured["clip_fraction/low"].tolist() == low
            assert measured["clip_fraction/high"].tolist() == high
            assert measured["clip_fraction"].tolist() == either


@pytest.mark.parametrize("loss", ["dual_clip", "grpo", "gspo", "gmpo"])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.0, 1.1, 1.5, 5.0])
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 1.0])
def test_a_token_counts_as_cut_where_its_advantage_leaves_no_gradient(loss, ratio, advantage):
    batch = loss_batch([math.log(ratio) - 2], [-2.0], [advantage], [1])
    losses, measured = LOSSES[loss](batch, **objective_with(loss).settings)
    [gradient] = torch.autograd.grad(losses.sum(), batch.logprobs)
    assert bool(measured["clip_fraction"]) == (advantage != 0 and gradient.item() == 0)


def test_the_page_of_choices_names_the_losses_that_tell_two_bounds_apart():
    page = (Path(__file__).resolve().parents[2] / "docs" / "algorithms.md").read_text()
    _, told = page.split("tell which bound cut (with ")
    named = set(re.findall("`([a-z_]+)`", told.partition(";")[0]))
    both = {"clip_fraction/low", "clip_fraction/high"}
    assert named == {
        loss for loss in LOSSES.names() if both <= {stat.key for stat in LOSSES[loss].stats}
    }


@pytest.mark.parametrize("loss", LOSSES.names())
def test_at_ratio_1_every_loss_has_the_gradient_of_reinforce_after_the_aggregation(loss):
    """Two responses of 3 tokens and 1: a mean over the tokens of each, then over both."""
    old = [-1.0, -2.0, -0.5, -3.0]
    advantages = [2.0, 2.0, 2.0, -1.0]
    batch = loss_batch(old, old, advantages, [3, 1], aggregation="sequence_mean")
    aggregated, sums = microbatch_loss(batch, with_sequence_mean(loss), NO_TERMS)
    [gradient] = torch.autograd.grad(aggregated, batch.logprobs)
    torch.testing.assert_close(gradient, torch.tensor([-2 / 6, -2 / 6, -2 / 6, 1 / 2]))
    tallies = sums.tallies(LOSSES[loss].all_stats)
    assert not any(tallies[key].total for key in tallies if key.startswith("clip_fraction"))


@pytest.mark.parametrize("loss", LOSSES.names())
@pytest.mark.parametrize("log_ratio", [-300.0, 300.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_a_ratio_beyond_all_bounds_leaves_numbers(loss, log_ratio, advantage):
    batch = loss_batch([-2.0 + log_ratio, -2.0], [-2.0, -2.0], [advantage] * 2, [1, 1])
    losses, _ = LOSSES[loss](batch, **objective_with(loss).settings)
    [gradient] = torch.autograd.grad(losses.sum(), batch.logprobs)
    assert losses.isfinite().all() and gradient.isfinite().all()


class Recorder(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", LOSSES.names())
@pytest.mark.parametrize(
    "correction",
    [
        Correction(weights="clip", reject="sequence"),
        Correction(weights="mask", reject="token"),
    ],
)
def test_every_operator_of_a_loss_has_a_kernel_on_npus(loss, correction):
    batch = loss_batch([-1.0, -2.0], [-1.1, -2.2], [1.0, -1.0], [1, 1], rollout=[-1.2, -2.0])
    terms = LossTerms("k3", 0.1, 0.1, "reward", correction)
    with Recorder() as recorder:
        aggregated, _ = microbatch_loss(batch, objective_with(loss), terms)
        aggregated.backward()
    assert len(recorder.names) > 20
    assert missing_kernels(recorder.names) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss=gmpo", "aggregation=token_mean"], "does not go with the loss gmpo; set it to"),
        (["loss=dual_clip", "loss_settings.clip_dual=1"], "1 must be a number from 1.01 to 1000"),
        (["loss=sapo", "loss_settings.tau_negative=0"], "0 must be a number from 0.01 to 100"),
    ],
)
def test_settings_that_do_not_fit_are_told(tiny, overrides, said):
    cfg, _ = load_config("tiny", [f"algorithm.{override}" for override in overrides])
    [problem] = check(cfg)
    assert said in problem


ROLLOUT = "algorithm.old_logprobs=rollout"
WIDE = "algorithm.loss_settings={clip_low: 0.02, clip_high: 0.02}"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm.loss=reinforce"], "the loss reinforce, which has no ratio"),
        (["algorithm=rloo", "training.staleness=1"], "the loss reinforce, which has no ratio"),
        (["algorithm.loss=gspo"], "the loss gspo, which cuts responses off whose ratio is 0.0003"),
        (["algorithm.loss=gspo", WIDE], None),
        (["algorithm.loss=gmpo"], None),
        (["algorithm.loss=cispo"], None),
    ],
)
def test_a_ratio_is_taken_to_the_engine_only_where_there_is_one_with_room(tiny, overrides, said):
    cfg, _ = load_config("tiny", [*overrides, ROLLOUT])
    problems = check(cfg)
    assert len(problems) == (said is not None)
    for problem in problems:
        assert problem.startswith("algorithm.old_logprobs: rollout does not go") and said in problem


ONE_UPDATE = "training.updates=accumulate"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm.loss=reinforce"], ["of the 2 updates of a step learn with others"]),
        (["algorithm=rloo"], ["algorithm.loss: reinforce has no ratio"]),
        (["algorithm=rloo", ONE_UPDATE], []),
        (["algorithm.loss=gmpo", ROLLOUT], ["into the ratio of the loss gmpo"]),
        (["algorithm.loss=gspo", WIDE, ROLLOUT], ["into the ratio of the loss gspo"]),
        (["algorithm.loss=gmpo"], []),
        (["algorithm.loss=cispo", ROLLOUT], []),
    ],
)
def test_samples_that_a_loss_cannot_correct_deserve_a_warning(tiny, overrides, said):
    warnings = cautions(load_config("tiny", overrides)[0])
    assert len(warnings) == len(said)
    for warning, part in zip(warnings, said, strict=True):
        assert part in warning
