"""Three updates of each policy loss, of corrections and of the KL in the reward against plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import make_model
from support.multiproc import run_ranks
from support.surrogates import SETTINGS
from support.updates import cases_body, compare, taught
from support.worlds import make_world

from r1zero.algo.losses import LOSSES
from r1zero.policy import actor
from r1zero.types import joined

LAYOUTS = {
    "one": (1, (1, 1), "actor_rollout.max_tokens_per_microbatch=40"),
    "tp2": (2, (2, 1), "actor_rollout.micro_batch_size=2"),
    "pp2": (2, (1, 2), "actor_rollout.micro_batch_size=2"),
    "dp2": (2, (1, 1), "actor_rollout.micro_batch_size=3"),
}
MASKED = {"masked": True}
DRAWN = {"drawn_at": -6.2}  # near the trainer's log-probs, with a deviation of 1
CORRECTION = "algorithm.correction"


def of_loss(loss, *keys):
    settings = ", ".join(f"{name}: {value}" for name, value in SETTINGS[loss].items())
    return [f"algorithm.loss={loss}", f"algorithm.loss_settings={{{settings}}}", *keys]


def masked_weights(log_weights):
    weights = log_weights.exp()
    return weights * ((weights >= 0.5) & (weights <= 2.0))


def within_geometric_mean(log_weights):
    return float(0.8 <= log_weights.mean().exp() <= 1.3)


def without_veto(log_weights):
    return float(bool((log_weights.exp() >= 0.2).all())) * log_weights.exp().clamp(max=1.5)


# Keys, what the samples are like, and how plain PyTorch is told the same.
UNMASKED = []  # seen on one rank
CASES = []
for name in LOSSES.names():
    aggregation = "sequence_mean" if LOSSES[name].aggregations else "token_mean"
    for samples, cases in (({}, UNMASKED), (MASKED, CASES)):
        told = {"loss_name": name, "aggregation": aggregation, "chosen": samples}
        cases.append((of_loss(name), samples, told))
CASES += [
    (
        ["algorithm.aggregation=sequence_mean"],
        MASKED,
        {"aggregation": "sequence_mean", "chosen": MASKED},
    ),
    (
        [f"{CORRECTION}={{weights: mask, low: 0.5, high: 2.0}}"],
        DRAWN,
        {"weigh": masked_weights, "chosen": DRAWN},
    ),
    (
        of_loss("gspo", f"{CORRECTION}={{reject: sequence, reject_low: 0.8, reject_high: 1.3}}"),
        DRAWN | MASKED,
        {
            "loss_name": "gspo",
            "aggregation": "sequence_mean",
            "weigh": within_geometric_mean,
            "chosen": DRAWN | MASKED,
        },
    ),
    (
        [f"{CORRECTION}={{weights: clip, cap: 1.5, reject: token, veto: 0.2}}"],
        DRAWN,
        {"weigh": without_veto, "chosen": DRAWN},
    ),
    (["algorithm.kl_in=reward"], {}, {"kl_in": "reward"}),
    (
        of_loss("sapo", "algorithm.kl_in=reward", "algorithm.kl_penalty=k3"),
        MASKED,
        {"loss_name": "sapo", "kl_in": "reward", "chosen": MASKED},
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_loss_equals_plain_pytorch(tmp_path, layout):
    """Also where the loss leaves tokens out, which then count neither in a ratio nor in a
    denominator."""
    size, cut, microbatches = LAYOUTS[layout]
    model = make_model("qwen2", tmp_path)
    if size == 1:
        cases = [*UNMASKED, *CASES]
    else:
        cases = CASES
    asked = [([microbatches, *keys], samples) for keys, samples, _ in cases]
    found, *_ = run_ranks(cases_body, size, str(tmp_path), cut, asked)
    for (losses, weights), (_, _, told) in zip(found, cases, strict=True):
        compare(copy.deepcopy(model), losses, weights, **told)


def still_body(rank, size, store, folder):
    """GSPO's updates in bf16 with a learning rate of 0: the share of clipped responses in each, and
    the microbatches of every pass in order, as numbers of their samples."""
    passes = []

    def noted(work):
        def noting(model, ddp, microbatches, *rest, **options):
            passes.append([[item.number for item in each] for each in microbatches])
            return work(model, ddp, microbatches, *rest, **options)

        return noting

    actor.compute_logprobs = noted(actor.compute_logprobs)
    actor.run_pipeline = noted(actor.run_pipeline)
    world = make_world(rank, size, store, (1, 1))
    keys = [
        "algorithm.loss=gspo",
        "actor_rollout.lr=0",
        "actor_rollout.max_tokens_per_microbatch=64",
    ]
    _, stats = taught(world, folder, keys, dtype=torch.bfloat16)
    return [joined([update], "clip_fraction") for update in stats], passes


def test_old_log_probs_come_from_the_same_microbatches(tmp_path):
    """The bounds of GSPO are narrower than the rounding of bf16: weights that have not moved would be
    clipped as soon as one of the two log-probs were computed in other company."""
    make_model("qwen2", tmp_path)
    [(clipped, passes)] = run_ranks(still_body, 1, str(tmp_path))
    assert clipped == [0.0, 0.0, 0.0]
    first, old_of_second, second, old_of_third, third = passes
    assert old_of_second == second and old_of_third == third
    assert len(first) > 1, "several, or they could not differ"
