"""Whole GRPO updates against a plain PyTorch step on transformers."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from support.models import make_model
from support.multiproc import run_ranks
from support.updates import compare, taught, update_body, updates, variants_body
from support.worlds import make_world

from r1zero.algo.advantages import ADVANTAGES
from r1zero.algo.aggregation import AGGREGATIONS
from r1zero.algo.parts import cut_parts
from r1zero.policy.actor import Actor

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize(
    ("size", "layout", "overrides"),
    [
        (1, (1, 1), []),
        (1, (1, 1), ["actor_rollout.micro_batch_size=3"]),
        (1, (1, 1), ["actor_rollout.max_tokens_per_microbatch=40"]),
        (1, (1, 1), ["actor_rollout.recompute_granularity=full"]),
        (
            2,
            (2, 1),
            ["actor_rollout.recompute_granularity=full", "training.sequence_parallel=true"],
        ),
        (
            2,
            (2, 1),
            ["actor_rollout.tensor_model_parallel_size=2", "training.sequence_parallel=true"],
        ),
        (2, (1, 2), ["actor_rollout.micro_batch_size=2"]),
        (2, (1, 1), ["actor_rollout.micro_batch_size=1"]),
        (4, (2, 1), ["actor_rollout.micro_batch_size=2"]),
        (8, (2, 2), ["actor_rollout.max_tokens_per_microbatch=64"]),
    ],
)
def test_three_updates_equal_plain_pytorch(tmp_path, size, layout, overrides):
    model = make_model("qwen2", tmp_path)
    (losses, weights), *_ = run_ranks(update_body, size, str(tmp_path), layout, overrides)
    compare(model, losses, weights)


AGGREGATION_NAMES = [*AGGREGATIONS.names(), "square_root"]
AGGREGATION_KEYS = [
    [f"algorithm.aggregation={name}"]
    for name in (*AGGREGATIONS.names(), f"{EXAMPLES}/aggregation_square_root.py:square_root")
]


# Without a cut, with DP, TP and PP.
CUTS = [
    (1, (1, 1), ["actor_rollout.max_tokens_per_microbatch=40"]),
    (2, (1, 1), ["actor_rollout.micro_batch_size=3"]),
    (2, (2, 1), ["actor_rollout.micro_batch_size=2"]),
    (2, (1, 2), ["actor_rollout.max_tokens_per_microbatch=64"]),
]
LEFT_OUT = {"masked": True, "resting": (2, 3, 4)}


@pytest.mark.parametrize(
    ("size", "layout", "overrides", "chosen"),
    [*((*each, LEFT_OUT) for each in CUTS), (*CUTS[0], {})],
)
def test_each_aggregation_equals_plain_pytorch(tmp_path, size, layout, overrides, chosen):
    """Also where tokens and groups are left out: what remains weighs what it did."""
    model = make_model("qwen2", tmp_path)
    found, *_ = run_ranks(
        variants_body, size, str(tmp_path), layout, overrides, AGGREGATION_KEYS, chosen
    )
    for name, (losses, weights) in zip(AGGREGATION_NAMES, found, strict=True):
        compare(copy.deepcopy(model), losses, weights, aggregation=name, chosen=chosen)


ADVANTAGE_NAMES = [*ADVANTAGES.names(), "best_only"]
ADVANTAGE_KEYS = [[f"algorithm.advantage={name}"] for name in ADVANTAGES.names()]
ADVANTAGE_KEYS.append([f"algorithm.advantage={EXAMPLES}/advantage_best_only.py:best_only"])
ADVANTAGE_KEYS[ADVANTAGE_NAMES.index("pass_at_k")].append("algorithm.advantage_settings.k=2")


@pytest.mark.parametrize(("size", "layout", "overrides"), CUTS)
def test_each_advantage_equals_plain_pytorch(tmp_path, size, layout, overrides):
    """Where the loss leaves tokens out, which then count in no whitening and no length, and a
    response, which counts."""
    model = make_model("qwen2", tmp_path)
    chosen = {"masked": True, "cut": (6,)}
    found, *_ = run_ranks(
        variants_body, size, str(tmp_path), layout, overrides, ADVANTAGE_KEYS, chosen
    )
    for name, (losses, weights) in zip(ADVANTAGE_NAMES, found, strict=True):
        compare(copy.deepcopy(model), losses, weights, advantage=name, chosen=chosen)


# The longest responses of the groups have 22, 24, 15, 23, 23 and 19 tokens.
PARTS = cut_parts(6, 1, [16, 21, 23])
WHOLE = {"accumulates": True, "minibatch_size": 24, "planned_parts": PARTS}


@pytest.mark.parametrize(
    ("size", "layout", "overrides"),
    [
        (1, (1, 1), ["actor_rollout.max_tokens_per_microbatch=40"]),
        (8, (2, 2), ["actor_rollout.micro_batch_size=2"]),
        (4, (1, 1), ["actor_rollout.micro_batch_size=3"]),
    ],
)
def test_gradients_of_parts_add_up_to_one_update(tmp_path, size, layout, overrides):
    """Two passes over the batch, each one update, where the loss leaves tokens out and one group
    rests. With four replicas some have nothing to learn of a part."""
    model = make_model("qwen2", tmp_path)
    chosen = {"masked": True, "resting": (4,)}
    keys = [*overrides, "actor_rollout.ppo_epochs=2"]
    found, *_ = run_ranks(
        variants_body, size, str(tmp_path), layout, keys, AGGREGATION_KEYS, chosen, WHOLE
    )
    for name, (losses, weights) in zip(AGGREGATION_NAMES, found, strict=True):
        assert len(losses) == 2
        compare(
            copy.deepcopy(model),
            losses,
            weights,
            2,
            chosen=chosen,
            prompts=6,
            aggregation=name,
        )


@pytest.mark.parametrize("size", [1, 2])
def test_the_ratio_goes_to_the_engines_log_probs_if_asked_for(tmp_path, size):
    model = make_model("qwen2", tmp_path)
    chosen = {"drawn_at": -6.2}
    (losses, weights), *_ = run_ranks(
        update_body, size, str(tmp_path), (1, 1), ["algorithm.old_logprobs=rollout"], chosen
    )
    compare(model, losses, weights, chosen=chosen, engine=True)


def cut_off_at_2(log_weights):
    return log_weights.exp().clamp(max=2.0)


@pytest.mark.parametrize("plan", [{}, WHOLE], ids=["minibatches", "one update"])
def test_older_samples_have_truncated_importance_weights(tmp_path, plan):
    """Engine and trainer differ by a factor of e on average, so many weights are cut off at 2."""
    model = make_model("qwen2", tmp_path)
    chosen = {"drawn_at": -7.2}
    stale = {**plan, "staleness": 1}
    (losses, weights), *_ = run_ranks(update_body, 2, str(tmp_path), (1, 1), [], chosen, stale)
    compare(model, losses, weights, chosen=chosen, weigh=cut_off_at_2, prompts=6 if plan else 2)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("resting", [(1, 2), (2, 3), (0, 1)])
def test_groups_that_do_not_train_leave_no_trace_and_a_minibatch_of_them_takes_no_step(
    tmp_path, size, resting
):
    model = make_model("qwen2", tmp_path)
    chosen = {"resting": resting}
    (losses, weights), *_ = run_ranks(update_body, size, str(tmp_path), (1, 1), [], chosen)
    assert len(losses) == (3 if resting == (1, 2) else 2)
    compare(model, losses, weights, chosen=chosen)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("cut", [(0, 3, 6, 13, 22), (8, 9, 10, 11, 12, 13, 14, 15, 20)])
def test_samples_that_are_cut_out_of_the_loss_still_count_in_advantages_and_denominators(
    tmp_path, aggregation, cut
):
    """The second time they are all of a minibatch, which takes no step; the third is then held to be
    the second update, whose old log-probs are those of the start."""
    model = make_model("qwen2", tmp_path)
    chosen = {"cut": cut, "masked": True}
    keys = [f"algorithm.aggregation={aggregation}"]
    (losses, weights), *_ = run_ranks(update_body, 2, str(tmp_path), (1, 1), keys, chosen)
    assert len(losses) == (3 if 8 not in cut else 2)
    compare(model, losses, weights, chosen=chosen, aggregation=aggregation)


@pytest.mark.parametrize(
    ("size", "layout", "overrides"),
    [
        (1, (1, 1), ["actor_rollout.max_tokens_per_microbatch=40"]),
        (2, (2, 1), ["actor_rollout.micro_batch_size=3"]),
        (2, (1, 2), ["actor_rollout.micro_batch_size=2"]),
        (2, (1, 1), ["actor_rollout.micro_batch_size=2", "algorithm.aggregation=sequence_mean"]),
    ],
    ids=["one", "TP 2", "PP 2", "DP 2"],
)
def test_to_skip_a_group_of_equal_rewards_changes_nothing_without_kl_and_entropy(
    tmp_path, size, layout, overrides
):
    """The third group is one. Gradients of rounding are far below the large eps of Adam here, so
    weights after three updates differ as little as the gradients do."""
    make_model("qwen2", tmp_path)
    keys = [*overrides, "algorithm.kl_ctrl.kl_coef=0", "actor_rollout.entropy_coeff=0"]
    found = []
    for resting in ((), (2,)):
        [(losses, weights), *_] = run_ranks(
            update_body, size, str(tmp_path), layout, keys, {"resting": resting}
        )
        found.append(([norm for *_, norm in losses], weights))
    (kept_norms, kept), (skipped_norms, skipped) = found
    assert skipped_norms == pytest.approx(kept_norms, rel=1e-6)
    for name, value in kept.items():
        error = (skipped[name] - value).norm() / value.norm()
        assert error < 1e-6, f"{name} differs by {error:.1e} of its norm"


@pytest.mark.parametrize(
    ("family", "size", "layout"),
    [
        ("qwen2_tied", 2, (1, 2)),
        ("qwen3", 2, (2, 1)),
        ("llama", 1, (1, 1)),
        ("mistral", 1, (1, 1)),
        ("olmo2", 1, (1, 1)),
        ("olmo2", 2, (2, 1)),
        ("olmo2", 2, (1, 2)),
    ],
)
def test_other_families_learn_the_same(tmp_path, family, size, layout):
    model = make_model(family, tmp_path)
    (losses, weights), *_ = run_ranks(update_body, size, str(tmp_path), layout, [])
    compare(model, losses, weights)


def unequal_stages_body(rank, size, store, folder):
    world = make_world(rank, size, store, (1, 2), num_layer_list=(1, 3))
    return updates(world, folder, ["actor_rollout.micro_batch_size=2"], (), ())


def test_stages_of_unequal_length_learn_the_same(tmp_path):
    """With tied weights, which the first and the last stage share."""
    model = make_model("qwen2_tied", tmp_path)
    (losses, weights), *_ = run_ranks(unequal_stages_body, 2, str(tmp_path))
    compare(model, losses, weights)


def test_norms_cut_by_tp_learn_the_same_under_sequence_parallelism_and_recomputation(tmp_path):
    model = make_model("olmo2", tmp_path)
    overrides = [
        "actor_rollout.recompute_granularity=full",
        "actor_rollout.tensor_model_parallel_size=2",
        "training.sequence_parallel=true",
    ]
    (losses, weights), *_ = run_ranks(update_body, 2, str(tmp_path), (2, 1), overrides)
    compare(model, losses, weights)


def test_two_epochs_equal_plain_pytorch(tmp_path):
    model = make_model("qwen2", tmp_path)
    [(losses, weights)] = run_ranks(
        update_body, 1, str(tmp_path), (1, 1), ["actor_rollout.ppo_epochs=2"]
    )
    # Six updates amplify rounding: each starts from weights that already differ in the last place.
    compare(model, losses, weights, epochs=2, tolerance=2e-5)


def forgetting_body(rank, size, store, folder):
    """By epoch, how many deliveries still have routes once they were learnt from."""
    left = [0, 0, 0]
    real = Actor._learn

    def learn(self, delivery, epoch):
        if epoch == 0:
            delivery.prompt_routes[0] = np.zeros((3, 1, 1), np.uint8)
        taken = real(self, delivery, epoch)
        left[epoch] += len(delivery.prompt_routes)
        return taken

    Actor._learn = learn
    world = make_world(rank, size, store, (1, 1))
    taught(world, folder, ["actor_rollout.ppo_epochs=3"], plan={"epochs": 3})
    return left


def test_routes_are_forgotten_after_the_last_epoch(tmp_path):
    make_model("qwen2", tmp_path)
    assert run_ranks(forgetting_body, 1, str(tmp_path)) == [[3, 3, 0]]
