"""The warning that a reward model is hacked: its score rises while the rules' verdicts fall."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest

from r1zero.observe.alarms import Alarms
from r1zero.observe.hacking import WINDOW, HackingWatch

STEPS = 120
SAMPLES = 64
Metrics = dict[str, float]
Course = Callable[[float], tuple[float, float, float]]  # right, model, correlation by time, 0 to 1


def steps_of(course: Course, seed: int, scale: float = 1.0) -> list[Metrics]:
    """A run whose batches of SAMPLES differ by chance; the model's values spread by `scale` within
    groups and by as much between steps."""
    random = np.random.default_rng(seed)
    found = []
    for step in range(1, STEPS + 1):
        right, model, correlation = course(step / STEPS)
        found.append(
            {
                "step": float(step),
                "reward/acc/right": random.binomial(SAMPLES, right) / SAMPLES,
                "reward/format/right": 0.9,
                "reward/model": scale * float(random.normal(model, 0.3)),
                "reward/model/std": scale,
                "reward/model/correlation/acc": float(random.normal(correlation, 0.12)),
            }
        )
    return found


def said(steps: Iterable[Metrics]) -> dict[int, str]:
    """The sentences by their steps."""
    watch = HackingWatch()
    told = {int(metrics["step"]): watch.look(metrics) for metrics in steps}
    return {step: sentence for step, sentence in told.items() if sentence}


def constant(time: float) -> tuple[float, float, float]:
    return 0.4, 0.0, 0.3


def healthy(time: float) -> tuple[float, float, float]:
    """Both rise, then rest."""
    risen = min(1.0, 2 * time)
    return 0.1 + 0.7 * risen, 3 * risen, 0.4


def stronger(time: float) -> tuple[float, float, float]:
    """Harder problems come, and the model says so, too."""
    return (0.7, 1.0, 0.3) if time < 0.5 else (0.4, 0.0, 0.3)


def hacked(time: float) -> tuple[float, float, float]:
    """Answers get right until half of the time, and wrong from then on; the model likes them more
    and more."""
    right = 0.3 + 0.6 * time if time < 0.5 else 1.0 - 0.8 * time
    return right, 4 * time, 0.2


def drowned(time: float) -> tuple[float, float, float]:
    """Right answers stay as many, but the model has come to prefer the wrong ones."""
    return 0.4, 1.0, 0.5 - 0.9 * time


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_hacked_model_is_told_soon_and_with_both_numbers(seed: int, scale: float) -> None:
    """Whatever the scale of its values. Two thirds of the right answers are lost by the end."""
    found = said(steps_of(hacked, seed, scale))
    first = min(found)
    assert STEPS / 2 < first < STEPS * 0.85, first
    assert max(found) == STEPS, "as long as it holds"
    words = found[first]
    assert words.startswith("since about step ") and ", while acc/right fell from 6" in words
    assert "reward.weight" in words and "algorithm.kl_ctrl.kl_coef" in words
    assert "checkpoint from before" in words


def test_the_numbers_are_those_of_the_windows() -> None:
    """Without chance: 50% right at a score of 1, then 20% at a score of 3."""
    steps = []
    for step in range(1, 4 * WINDOW + 1):
        is_late = step > 2 * WINDOW
        right, model = (0.2, 3.0) if is_late else (0.5, 1.0)
        steps.append(
            {
                "step": float(step),
                "reward/acc/right": right,
                "reward/model": model,
                "reward/model/std": 0.5,
            }
        )
    found = said(steps)
    whole = "rose from 1.00 to 3.00, while acc/right fell from 50% to 20%: "
    assert whole in found[3 * WINDOW] and f"since about step {WINDOW} " in found[3 * WINDOW]


@pytest.mark.parametrize("seed", range(5))
def test_a_model_that_turns_against_a_rule_is_told(seed: int) -> None:
    found = said(steps_of(drowned, seed))
    first = min(found)
    assert STEPS / 2 < first < STEPS
    assert found[first].startswith("the reward model now prefers what acc calls wrong: ")
    assert "reward.weight" in found[first]


@pytest.mark.parametrize("course", [constant, healthy, stronger])
def test_a_healthy_course_and_mere_chance_are_no_trouble(course: Course) -> None:
    for seed in range(8):
        assert said(steps_of(course, seed)) == {}, (course, seed)


def test_a_function_without_verdicts_cannot_be_spoken_against() -> None:
    steps = steps_of(drowned, 0)
    for metrics in steps:
        metrics["reward/model/correlation/length"] = metrics.pop("reward/model/correlation/acc")
    assert said(steps) == {}


def test_steps_that_the_model_has_no_part_in_are_passed_over() -> None:
    steps = steps_of(hacked, 0)
    expected = said(steps)
    among = []
    for metrics in steps:
        among += [metrics, {"step": metrics["step"], "reward/acc/right": 1.0}]
    watch = HackingWatch()
    told = [watch.look(metrics) for metrics in among]
    assert told[1::2] == [None] * STEPS
    assert [sentence for sentence in told[0::2] if sentence] == list(expected.values())


def test_the_alarms_of_a_run_say_it_once_until_it_has_lasted() -> None:
    fine = {"reward/mean": 0.2, "time/step": 1.0, "time/wait/train": 0.0}
    alarms = Alarms(1e-3, 0.05, lambda steps: None)
    told = [sentence for each in steps_of(hacked, 0) for sentence in alarms.look(fine | each)]
    about = [sentence for sentence in told if "reward model" in sentence]
    assert 1 <= len(about) <= 5 and len(about) < len(said(steps_of(hacked, 0))) / 2
