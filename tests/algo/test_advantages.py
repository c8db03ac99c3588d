"""Advantage estimators: worked values, what they declare, what a configuration may say of them."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from r1zero.algo.advantages import ADVANTAGES, advantages_of, as_advantage
from r1zero.algo.group_table import GroupTable
from r1zero.algo.whitening import whiten
from r1zero.errors import BadInput
from r1zero.preflight.checks import check
from r1zero.preflight.resolve import load_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
OWN = f"{EXAMPLES}/advantage_best_only.py:best_only"

# Two groups of four responses; all values below were worked out without the epsilons.
REWARDS = np.array([[1.0, 1, 0, 0], [1, 0, 0, 0]])
LENGTHS = np.array([[1, 2, 3, 2], [4, 1, 1, 2]])
TOLERANCE = 1e-5  # of the worked digits, and of the epsilons


def make_table(rewards=REWARDS, counted=LENGTHS, scores=None, weights=(), right=None):
    rewards = np.asarray(rewards, np.float64)
    return GroupTable(
        rewards=rewards,
        counted=np.broadcast_to(counted, rewards.shape),
        right=rewards > 0 if right is None else right,
        scores=np.zeros((*rewards.shape, 0)) if scores is None else scores,
        score_weights=np.array(weights),
    )


def estimated(name, table, **settings):
    """The advantages as the policy gets them: whitened, if the estimator says so."""
    chosen = as_advantage(ADVANTAGES[name])
    found = advantages_of(table, chosen, chosen.settings(settings))
    if chosen.whitens is None:
        return found
    flat = whiten(found.reshape(-1), table.counted.reshape(-1), chosen.whitens)
    return flat.reshape(found.shape)


def of_two(right, wrong):
    """Of a group with the rewards 1 1 0 0, or 1 0 0 0."""
    return [right, right, wrong, wrong], [right, wrong, wrong, wrong]


# Whitening divides by the variance with n - 1: of 16 tokens, 15 / 16 of what a population's is.
BESSEL = np.sqrt(15 / 16)


@pytest.mark.parametrize(
    ("name", "settings", "first", "second"),
    [
        ("group_norm", {}, of_two(0.866025, -0.866025), of_two(1.5, -0.5)),
        ("grpo", {}, of_two(0.866025, -0.866025), of_two(1.5, -0.5)),
        ("group_mean", {}, of_two(0.5, -0.5), of_two(0.75, -0.25)),
        ("dr_grpo", {}, of_two(0.5, -0.5), of_two(0.75, -0.25)),
        ("leave_one_out", {}, of_two(0.666667, -0.666667), of_two(1, -0.333333)),
        ("rloo", {}, of_two(0.666667, -0.666667), of_two(1, -0.333333)),
        ("lite_ppo", {}, of_two(0.966092, -0.966092), of_two(1.449138, -0.483046)),
        (
            "reinforce_pp",
            {},
            of_two(1.133893 * BESSEL, -0.881917 * BESSEL),
            of_two(1.133893 * BESSEL, -0.881917 * BESSEL),
        ),
        (
            "reinforce_pp_baseline",
            {},
            of_two(0.804367, -1.034187),
            of_two(1.264006, -0.574548),
        ),
        ("max_rl", {}, of_two(1, -1), of_two(3, -1)),
        ("opo", {}, of_two(0.625, -0.375), of_two(0.5, -0.5)),
        ("pass_at_k", {"k": 2}, of_two(0.447214, -0.447214), of_two(1, -0.333333)),
        (OWN, {}, of_two(0, 0), of_two(2, 0)),
    ],
)
def test_the_advantages_of_two_groups_by_hand(name, settings, first, second):
    found = estimated(name, make_table(), **settings)
    np.testing.assert_allclose(found, [first[0], second[1]], rtol=TOLERANCE, atol=1e-9)


def test_gdpo_normalises_each_reward_function_before_it_adds_them_up():
    """The sums of the scores, 1 .5 .5 .5, would not tell the last three apart."""
    scores = np.array([[[1.0, 1], [1, 0], [0, 1], [0, 1]]])
    table = make_table([[1, 0.5, 0.5, 0.5]], 1, scores, weights=(0.5, 0.5))
    chosen = ADVANTAGES["gdpo"]
    found = advantages_of(table, chosen, {})
    expected = np.array([0.683013, -0.316987, -0.183013, -0.183013])
    np.testing.assert_allclose(found, [expected], rtol=TOLERANCE)
    whitened = estimated("gdpo", table)
    np.testing.assert_allclose(whitened, [expected / expected.std(ddof=1)], rtol=TOLERANCE)


def test_gdpo_whitens_over_samples_so_length_does_not_count():
    scores = np.stack([REWARDS, 1 - REWARDS[::-1]], axis=2)
    short, long = (
        estimated("gdpo", make_table(counted=lengths, scores=scores, weights=(1.0, 0.5)))
        for lengths in (1, LENGTHS)
    )
    np.testing.assert_array_equal(short, long)


def test_whitening_weighs_by_tokens_or_not():
    # Tokens: 1, 1, 1, -1 -> mean 0.5, variance (3 x 0.25 + 2.25) / 3 = 1
    np.testing.assert_allclose(whiten([1.0, -1.0], [3, 1]), [0.5, -1.5], rtol=1e-7)
    root = np.sqrt(0.5)
    np.testing.assert_allclose(whiten([1.0, -1.0], [3, 1], "samples"), [root, -root], rtol=1e-7)


SETTINGS = {"pass_at_k": {"k": 3}}


@pytest.mark.parametrize("name", [*ADVANTAGES.names(), pytest.param(OWN, id="own")])
def test_equal_groups_are_zero_where_that_is_declared(name):
    """Exactly: rounding must not invent a preference. Beside a group that is not equal."""
    chosen = ADVANTAGES[name]
    random = np.random.default_rng(2)
    is_zero = True
    for reward in (0.0, 1.0, 1 / 3, 0.7, -0.1):
        for size in (3, 7, 64):
            rewards = np.stack([np.full(size, reward), random.normal(size=size)])
            scores = np.stack([rewards, np.stack([np.full(size, 0.1), rewards[1]])], axis=2)
            counted = random.integers(1, 99, rewards.shape)
            table = make_table(rewards, counted, scores, weights=(1.0, 0.3))
            is_zero = is_zero and not estimated(name, table, **SETTINGS.get(name, {}))[0].any()
    assert is_zero == chosen.equal_groups_are_zero


@pytest.mark.parametrize("name", ADVANTAGES.names())
def test_what_looks_at_each_group_alone_says_so(name):
    """A third group changes the advantages of the others only where groups are compared."""
    rewards = np.array([[1.0, 0.2, 0], [0, 1, 1], [9, 0, 0]])
    scores = np.stack([rewards, rewards**2], axis=2)
    settings = SETTINGS.get(name, {}) and {"k": 2}
    three, two = (
        estimated(name, make_table(rewards[:n], 4, scores[:n], (1.0, 0.3)), **settings)
        for n in (3, 2)
    )
    same = np.allclose(three[:2], two, rtol=1e-12)
    assert same == (not ADVANTAGES[name].needs_whole_update)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_equals_the_mean_over_all_choices_of_k(k):
    """By brute force: the reward of k responses is that of the best, and a response has the mean
    over the choices it is in."""
    for right in range(5):
        verdicts = np.arange(4) < right
        choices = list(combinations(range(4), k))
        best = np.array([verdicts[list(choice)].any() for choice in choices], np.float64)
        found = estimated("pass_at_k", make_table([verdicts], 1), k=k)[0]
        for member in range(4):
            mine = [value for choice, value in zip(choices, best, strict=True) if member in choice]
            expected = np.mean(mine) - best.mean()
            if best.std():
                expected /= best.std()
            assert found[member] == pytest.approx(expected, abs=1e-12)


def test_max_rl_leaves_groups_out_whose_mean_is_not_above_0():
    assert not estimated("max_rl", make_table([[1, -2, 0], [-1, 0, 1]], 1)).any()


def test_a_plain_function_sees_the_rewards():
    plain = as_advantage(lambda rewards: rewards - rewards.min())
    assert advantages_of(make_table([[3, 1, 2]], 1), plain, {}).tolist() == [[2, 0, 1]]


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (lambda rewards: rewards[0], "the shape (2,) for rewards of the shape (1, 2)"),
        (lambda rewards: rewards * np.nan, "return finite numbers"),
    ],
)
def test_an_own_advantage_that_returns_something_else_is_told(own, said):
    with pytest.raises(BadInput) as caught:
        advantages_of(make_table([[1, 0]], 1), as_advantage(own), {})
    assert said in str(caught.value)


def test_a_group_of_one_is_refused():
    with pytest.raises(BadInput, match="at least 2 samples.*raise n_samples_per_prompt"):
        advantages_of(make_table([[1.0]], 1), ADVANTAGES["group_norm"], {})


# -- what a configuration may say -----------------------------------------------------------------


@pytest.fixture
def plain_function(tmp_path):
    """A file with functions of rewards, and what names one of them."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def shifted(rewards, *, by=0.5):\n"
        "    return rewards - by\n"
        "def broken(rewards):\n"
        "    return rewards.median()\n"
    )
    return lambda name: f"{file}:{name}"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["advantage=group_men"], ["group_men is not one of gdpo, group_mean", "did you mean"]),
        (
            ["advantage=leave_one_out", "advantage_settings.scale=std"],
            ["algorithm.advantage_settings.scale: std must be none", "deviation 0"],
        ),
        (
            ["advantage=reinforce_pp", "advantage_whiten=true"],
            ["advantage_whiten: true would whiten once more what reinforce_pp whitens"],
        ),
        (
            ["advantage=gdpo", "verifier_function=[acc]", "verifier_weight=[1]"],
            ["gdpo normalises reward functions one by one", "names only one"],
        ),
        (["advantage=pass_at_k"], ["algorithm.advantage_settings.k is missing"]),
        (
            ["advantage=pass_at_k", "advantage_settings.k=5000"],
            ["algorithm.advantage_settings.k: 5000 must be from 1 to 1024"],
        ),
        (
            ["advantage=pass_at_k", "advantage_settings.k=100"],
            ["k: 100 must be at most actor_rollout.n_samples_per_prompt"],
        ),
        (
            [
                "advantage=pass_at_k",
                "advantage_settings.k=2",
                "verifier_function=[format]",
                "verifier_weight=[1]",
            ],
            ["pass_at_k looks at which responses are right", "name acc, too"],
        ),
        (
            ["advantage=group_mean", "advantage_settings.k=2"],
            ["algorithm.advantage_settings.k is unknown"],
        ),
    ],
)
def test_what_does_not_fit_is_told_with_its_key(tiny, overrides, said):
    assert_told([f"algorithm.{override}" for override in overrides], said)


@pytest.mark.parametrize("name", ["lite_ppo", "reinforce_pp", "reinforce_pp_baseline", "gdpo"])
def test_what_compares_groups_does_not_go_with_accumulated_updates(tiny, name):
    overrides = [f"algorithm.advantage={name}", "training.updates=accumulate"]
    assert_told(overrides, [f"{name} compares the groups", "set updates to per_minibatch"])


def test_a_plain_function_of_rewards_is_tried_and_may_compare_groups(tiny, plain_function):
    shifted = f"algorithm.advantage={plain_function('shifted')}"
    cfg, _ = load_config("tiny", [shifted, "algorithm.advantage_settings.by=0.25"])
    assert check(cfg) == []
    assert_told([shifted, "training.updates=accumulate"], ["put @advantage() of"])
    assert_told(
        [f"algorithm.advantage={plain_function('broken')}"],
        ["broken fails on a trial with two groups: AttributeError"],
    )


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        ("Tensor", "NameError: name 'Tensor' is not defined"),
        ("np.ndarray", "schema for <class 'numpy.ndarray'>"),
        ("1", "of own cannot be read"),
    ],
)
def test_annotations_of_an_own_function_that_are_no_settings_are_told(tiny, tmp_path, hint, said):
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from typing import TYPE_CHECKING\n"
        "import numpy as np\n"
        "if TYPE_CHECKING:\n"
        "    from torch import Tensor\n"
        f"def own(rewards, *, by: {hint} = 1):\n"
        "    return rewards\n"
    )
    place = f"algorithm.advantage={file}:own"
    assert_told([place], ["algorithm.advantage_settings: ", said, "annotate them with types"])


@pytest.mark.parametrize("name", [*ADVANTAGES.names(), pytest.param(OWN, id="own"), "rloo"])
def test_every_estimator_breaks_no_rule(tiny, name):
    overrides = [f"algorithm.advantage={name}"]
    if name == "pass_at_k":
        overrides.append("algorithm.advantage_settings.k=2")
    cfg, _ = load_config("tiny", overrides)
    assert check(cfg) == []


def assert_told(overrides, said):
    try:
        cfg, _ = load_config("tiny", overrides)
        [problem] = check(cfg)
    except BadInput as error:
        problem = str(error)
    assert all(part in problem for part in said), problem
