"""The usual end of a reward model: its score rises while the verdicts of the rules fall. The policy then
writes what the model likes, and not what is right.

Steps differ by chance, so windows of steps are compared, and a change must be larger than what
windows differ by when nothing changes. That is told by how much a value jumps from one step to the
next: learning moves it slowly.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from r1zero.observe.model_summary import CORRELATION_KEY, DEVIATION_KEY, MEAN_KEY

WINDOW = 5  # steps
NOISE_STEPS = 100  # whose jumps tell what is chance
CHANCE = 5.0  # standard errors of a difference of windows that chance may reach
# Of the right answers of the best window, and of all answers.
LOST = 0.25
LOST_LEAST = 0.05
RISE = 0.5  # of the spread of the model's scores within a group
AGAINST = -0.1  # a correlation below which the model speaks against a rule
AGREES = 0.1  # and one from which on it agrees with it


def correlation_with(right_key: str) -> str:
    """The key of the model's correlation with the rule that a share of right answers is of."""
    return CORRELATION_KEY + right_key.removeprefix("reward/").removesuffix("/right")


class Window:
    """The last values of a metric."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=NOISE_STEPS)

    def add(self, value: float) -> None:
        self._values.append(value)

    @property
    def full(self) -> bool:
        """Whether there are two windows, of which one does not overlap with the last."""
        return len(self._values) >= 2 * WINDOW

    @property
    def last(self) -> float:
        """The mean of the last window."""
        return float(np.mean(list(self._values)[-WINDOW:]))

    @property
    def before(self) -> float:
        """The mean of the window before the last one."""
        return float(np.mean(list(self._values)[-2 * WINDOW : -WINDOW]))

    @property
    def chance(self) -> float:
        """What two windows may differ by without any change. The mean jump of normal noise is 1.128
        standard deviations."""
        jump = float(np.mean(np.abs(np.diff(list(self._values)))))
        return CHANCE * jump / 1.128 * math.sqrt(2 / WINDOW)


@dataclass(frozen=True, slots=True)
class Best:
    """The window in which a rule found most right answers."""

    step: int  # its last
    right: float
    model: float  # the mean score of the reward model then
    spread: float  # of its scores within a group


class HackingWatch:
    """Looks at each step of a run."""

    def __init__(self) -> None:
        self._windows: defaultdict[str, Window] = defaultdict(Window)  # by metric
        self._best: dict[str, Best] = {}  # by the share that a rule calls right
        self._agreed: dict[str, float] = {}  # by correlation: that of its best window

    def look(self, metrics: Mapping[str, float]) -> str | None:
        """Return what is to be said about this step."""
        if MEAN_KEY not in metrics or DEVIATION_KEY not in metrics:
            return None
        rights = [key for key in metrics if key.startswith("reward/") and key.endswith("/right")]
        correlations = [correlation_with(key) for key in rights if correlation_with(key) in metrics]
        for key in [MEAN_KEY, DEVIATION_KEY, *rights, *correlations]:
            self._windows[key].add(metrics[key])
        if not self._windows[MEAN_KEY].full:
            return None
        fallen = [self._fallen(key, int(metrics["step"])) for key in rights]
        turned = [self._turned(key) for key in correlations]
        return next((sentence for sentence in [*fallen, *turned] if sentence), None)

    def _fallen(self, key: str, step: int) -> str | None:
        """Whether a rule finds fewer right answers than it did, and the model likes them better."""
        right = self._windows[key]
        if not right.full:
            return None
        model = self._windows[MEAN_KEY]
        spread = self._windows[DEVIATION_KEY]
        best = self._best.get(key)
        if best is None or right.before > best.right:
            best = Best(step - WINDOW, right.before, model.before, spread.before)
            self._best[key] = best
        lost = best.right - right.last
        risen = model.last - best.model
        if lost <= max(LOST * best.right, LOST_LEAST, right.chance):
            return None
        if risen <= max(RISE * best.spread, model.chance):
            return None
        return (
            f"since about step {best.step} the mean score of the reward model rose from "
            f"{best.model:.2f} to {model.last:.2f}, while {key.removeprefix('reward/')} fell from "
            f"{best.right:.0%} to {right.last:.0%}: responses become what the model likes instead of "
            "right; go back to a checkpoint from before, with a lower reward.weight or a higher "
            "algorithm.kl_ctrl.kl_coef"
        )

    def _turned(self, key: str) -> str | None:
        """Whether the model, which agreed with a rule, now speaks against it."""
        window = self._windows[key]
        if not window.full:
            return None
        agreed = max(self._agreed.get(key, -1.0), window.before)
        self._agreed[key] = agreed
        if agreed < AGREES or window.last > AGAINST or agreed - window.last <= window.chance:
            return None
        return (
            f"the reward model now prefers what {key.removeprefix(CORRELATION_KEY)} calls wrong: "
            f"their correlation fell from {agreed:+.2f} to {window.last:+.2f}; lower reward.weight or "
            "raise algorithm.kl_ctrl.kl_coef, and take a checkpoint from before"
        )
