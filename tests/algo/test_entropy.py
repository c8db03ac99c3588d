"""The entropy coefficient: fixed, or steered to a target."""

from __future__ import annotations

import pytest

from r1zero.algo.entropy import EntropyCoefficient
from r1zero.config.load import dump
from r1zero.preflight.checks import check
from r1zero.preflight.resolve import load_config


def test_a_fixed_coefficient_stays():
    fixed = EntropyCoefficient(0.01)
    fixed.update(5.0)
    fixed.restore(0.3, False)
    assert fixed.applied == 0.01
    assert fixed.kept is None, "one that is steered from here on starts where it is told to"


def test_the_coefficient_moves_by_steps_and_applies_only_below_the_target():
    adaptive = EntropyCoefficient(0.0, target=0.2, step=0.005, most=0.012)
    assert adaptive.applied == 0
    for measured, value, applied in (
        (0.15, 0.005, 0.005),
        (0.2, 0.010, 0.010),  # at the target counts as below it
        (0.1, 0.012, 0.012),  # the most
        (0.3, 0.007, 0.0),  # above: no bonus, but the coefficient is remembered
        (0.1, 0.012, 0.012),
        (0.9, 0.007, 0.0),
        (0.9, 0.002, 0.0),
        (0.9, 0.0, 0.0),  # never below 0
    ):
        adaptive.update(measured)
        assert adaptive.value == pytest.approx(value) and adaptive.applied == pytest.approx(applied)


def test_a_checkpoint_brings_it_back_and_an_older_one_leaves_the_start():
    adaptive = EntropyCoefficient(0.001, target=0.2, step=0.005, most=0.1)
    adaptive.restore(None, True)
    assert adaptive.applied == 0.001
    adaptive.restore(0.05, False)
    assert (adaptive.value, adaptive.applied) == (0.05, 0.0)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm.entropy_ctrl.type=adaptive"], "algorithm.entropy_ctrl.target: nothing must"),
        (
            ["algorithm.entropy_ctrl={type: adaptive, target: -1}"],
            "algorithm.entropy_ctrl.target: -1.0 must be above 0",
        ),
        (
            [
                "algorithm.entropy_ctrl={type: adaptive, target: 0.2, max: 0.1}",
                "actor_rollout.entropy_coeff=0.2",
            ],
            "actor_rollout.entropy_coeff: 0.2 is above algorithm.entropy_ctrl.max 0.1",
        ),
    ],
)
def test_what_does_not_fit_is_told(tiny, overrides, said):
    [problem] = check(load_config("tiny", overrides)[0])
    assert said in problem


def test_the_section_comes_back_from_a_dump(tiny, tmp_path):
    cfg, warnings = load_config("tiny", ["algorithm.entropy_ctrl={type: adaptive, target: 0.2}"])
    assert check(cfg) == [] and not any("entropy_ctrl" in warning for warning in warnings)
    (tmp_path / "dumped.yaml").write_text(dump(cfg))
    assert load_config(str(tmp_path / "dumped.yaml"))[0].algorithm == cfg.algorithm
    _, warnings = load_config("tiny", ["algorithm.entropy_ctrl.target=0.2"])
    assert any("algorithm.entropy_ctrl.target" in warning for warning in warnings)
