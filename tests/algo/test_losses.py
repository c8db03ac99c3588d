"""Policy losses: values by hand; what a configuration may say of the objective."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.patience import LONG

from r1zero.algo.loss import LossTerms, microbatch_loss
from r1zero.algo.loss_batch import LossBatch
from r1zero.algo.losses import LOSSES, policy_loss, stats_of
from r1zero.algo.objective import choose_objective
from r1zero.config.load import dump
from r1zero.errors import BadInput
from r1zero.preflight.checks import check
from r1zero.preflight.resolve import load_config
from r1zero.types import Reduce, UpdateStats, joined

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def make_batch(logprobs, old, advantages, lengths):
    """Fields that a loss of the policy alone looks at; the others are zero."""
    logprobs = torch.tensor(logprobs, requires_grad=True)
    zeros = torch.zeros(len(logprobs))
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    ones = torch.ones(len(logprobs))
    return LossBatch(
        logprobs=logprobs,
        entropy=zeros,
        old_logprobs=torch.tensor(old),
        trainer_logprobs=torch.tensor(old),
        ref_logprobs=zeros,
        rollout_logprobs=torch.tensor(old),
        advantages=torch.tensor(advantages),
        mask=ones,
        cu_seqlens=cu_seqlens,
        weights=ones,
    )


# Two tokens, ratios e^0.2 = 1.221403 and e^-0.4 = 0.670320; of the sequence e^-0.1 = 0.904837.
@pytest.mark.parametrize(
    ("loss", "settings", "good", "good_gradient", "bad", "bad_gradient"),
    [
        ("grpo", CLIP, [-1.2, -0.670320], [0, -0.670320], [1.221403, 0.8], [1.221403, 0]),
        (
            "grpo",
            {"clip_low": 0.2, "clip_high": 0.28},
            [-1.221403, -0.670320],
            [-1.221403, -0.670320],
            [1.221403, 0.8],
            [1.221403, 0],
        ),
        ("gspo", {}, [-0.904837] * 2, [-0.904837] * 2, [0.9997] * 2, [0, 0]),
        (
            "cispo",
            {},
            [0.977122, 1.608768],
            [-1.221403, -0.670320],
            [-0.977122, -1.608768],
            [1.221403, 0.670320],
        ),
        (
            "cispo",
            {"ratio_cap": 1.2},
            [0.96, 1.608768],
            [-1.2, -0.670320],
            [-0.96, -1.608768],
            [1.2, 0.670320],
        ),
        (
            # probabilities 0.3679 to 0.4493, and 0.1353 to 0.0907
            f"{EXAMPLES}/loss_dppo.py:dppo",
            {"most_gain": 0.08, "most_loss": 0.04},
            [0, 1.608768],
            [0, -0.670320],
            [-0.977122, 0],
            [1.221403, 0],
        ),
    ],
)
def test_losses_and_gradients_by_hand(loss, settings, good, good_gradient, bad, bad_gradient):
    found = LOSSES[loss]
    settings = found.settings(settings, {})
    for advantage, values, gradient in ((1.0, good, good_gradient), (-1.0, bad, bad_gradient)):
        batch = make_batch([-0.8, -2.4], [-1.0, -2.0], [advantage] * 2, [2])
        losses, _ = found(batch, **settings)
        [slope] = torch.autograd.grad(losses.sum(), batch.logprobs)
        torch.testing.assert_close(losses.detach(), torch.tensor(values), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            slope, torch.tensor(gradient, dtype=torch.float32), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("loss", LOSSES.names())
def test_before_the_weights_have_moved_every_loss_is_reinforce(loss):
    old = [-1.0, -2.0, -0.5]
    advantages = [2.0, 2.0, -1.0]
    batch = make_batch(old, old, advantages, [2, 1])
    losses, _ = LOSSES[loss](batch, **LOSSES[loss].settings({}, CLIP))
    [gradient] = torch.autograd.grad(losses.sum(), batch.logprobs)
    torch.testing.assert_close(gradient, -torch.tensor(advantages))


def test_the_share_of_clipped_sequences_is_a_mean_over_sequences():
    """A response of three tokens above the bound, and one of one token within it."""
    batch = make_batch([-0.5, -0.5, -0.5, -1.0], [-1.0] * 4, [1.0] * 4, [3, 1])
    found = {}
    for loss, inherited in (("gspo", {}), ("grpo", CLIP)):
        objective = choose_objective(loss, {}, inherited, None, "group_norm", {})
        _, sums = microbatch_loss(batch, objective, LossTerms("kl", 0.0, 0.0))
        update = UpdateStats(sums.tallies(objective.loss.all_stats), sums.tokens, 0.0, 0.0)
        found[loss] = joined([update], "clip_fraction")
    assert found == {"gspo": 0.5, "grpo": 0.75}


def test_a_loss_must_return_the_statistics_that_it_declares():
    @policy_loss()
    def careless(batch):
        return batch.logprobs, {"extra": batch.logprobs}

    with pytest.raises(
        BadInput, match=r"the loss careless declares the statistics \[\] but returns \['extra'\]"
    ):
        careless(make_batch([0.0], [0.0], [0.0], [1]))


def test_a_statistic_joins_over_updates_as_it_is_reduced():
    stats = stats_of("gspo")
    assert {stat.reduce for stat in stats} == set(Reduce)
    assert [stat.key for stat in stats_of("moved.py:own")] == [
        s.key for s in stats if not s.key.startswith("clip_fraction")
    ]


# -- what a configuration may say -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["loss=gpso"],
            ["algorithm.loss: gpso is not one of cispo, ", "reinforce, sapo; did you mean gspo?"],
        ),
        (
            ["loss=gspo", "aggregation=token_mean"],
            ["token_mean does not go with the loss gspo; set it to sequence_mean"],
        ),
        (
            ["loss=cispo", "loss_settings.ratio_cup=2"],
            ["ratio_cup is no setting of the loss cispo; did you mean ratio_cap?"],
        ),
        (
            ["loss=gspo", "loss_settings.clip_low=2"],
            ["algorithm.loss_settings.clip_low: 2 must be a number from 0 to 1"],
        ),
        (
            ["loss_settings.clip_low=wide"],
            ["algorithm.loss_settings.clip_low: wide must be a number from 0 to 1"],
        ),
        (["loss_settings=3"], ["algorithm.loss_settings: 3 must be a section with keys"]),
        (["aggregation=math:pow"], ["must take one argument"]),
        (
            ["aggregation=tokens"],
            [
                "algorithm.aggregation: tokens is not one of constant, group_token_mean, sequence_mean,"
            ],
        ),
        (
            ["adv_estimator=gae"],
            ["algorithm.adv_estimator: gae is not one of gdpo, group_mean, group_norm", "critic"],
        ),
        (["loss=nowhere.py:f"], ["there is no file nowhere.py"]),
        (["loss=os.path:join"], ["os.path:join is no policy loss: put @policy_loss()"]),
        (["loss=no.such.module:f"], ["no.such.module:f cannot be loaded: ModuleNotFoundError"]),
        (["advantage=math:pi"], ["pi in math is no function"]),
        (
            [f"loss={EXAMPLES}/loss_dppo.py:dpo"],
            ["has no dpo; did you mean dppo?"],
        ),
    ],
)
def test_what_does_not_fit_is_told_with_its_key(tiny, overrides, said):
    try:
        cfg, _ = load_config("tiny", [f"algorithm.{override}" for override in overrides])
        [problem] = check(cfg)
    except BadInput as error:
        problem = str(error)
    assert all(part in problem for part in said), problem


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss=gspo", "loss_settings={clip_low: 3e-4, clip-high: 4e-4}"],
        ["loss=cispo"],
        [
            f"loss={EXAMPLES}/loss_dppo.py:dppo",
            f"advantage={EXAMPLES}/advantage_best_only.py:best_only",
            f"aggregation={EXAMPLES}/aggregation_square_root.py:square_root",
        ],
    ],
)
def test_what_fits_breaks_no_rule_and_comes_back_from_a_dump(tiny, tmp_path, overrides):
    cfg, _ = load_config("tiny", [f"algorithm.{override}" for override in overrides])
    assert check(cfg) == []
    (tmp_path / "dumped.yaml").write_text(dump(cfg))
    assert load_config(str(tmp_path / "dumped.yaml"))[0].algorithm == cfg.algorithm


def test_the_losses_of_a_configuration_are_checked_without_torch():
    code = (
        "import sys\n"
        "from r1zero.algo.losses import LOSSES\n"
        "from r1zero.algo.objective import choose_objective\n"
        "clip = {'clip_low': 0.2, 'clip_high': 0.2}\n"
        "for name in LOSSES.names():\n"
        "    choose_objective(name, {}, clip, None, 'group_norm', {})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LONG)
