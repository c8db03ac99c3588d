"""Warnings in plain words about a run that goes on but goes wrong, from the metrics of its steps.

A warning is given when it begins to hold, and again every REPEAT steps while it does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from r1zero.observe.hacking import HackingWatch
from r1zero.observe.metrics import WAIT_KEY

Metrics = Mapping[str, float]

REPEAT = 20  # steps
EQUAL_GROUPS = 0.9  # of all groups: fewer than one in ten teaches anything
KL_LIMIT = 1.0  # nats a token: the policy gives its tokens e times the reference's probability
KL_GROWTH = 10.0  # times the median of the last WINDOW steps, once it is above KL_NOTABLE
KL_NOTABLE = 0.1
ENTROPY_SHARE = 0.1  # of what it was in the first steps that this process saw
ENTROPY_LOW = 0.1  # nats a token: nine tokens in ten are as good as certain
ENTROPY_GROWTH = 3.0  # times what it was in the first steps, once it is above ENTROPY_HIGH
ENTROPY_HIGH = 1.0  # nats a token: as if three tokens were equally likely each time
# of the responses right by every reward function: equal rewards and low entropy are then what success looks
# like
LEARNED = 0.9
TRUNCATED = 0.5  # of the responses: the reward then measures the length limit
# of the responses have a score that failed: worth a look long before max_failure_rate stops the run
FAILED = 0.01
NEVER_RIGHT = 10  # steps without a right response
WAIT = 0.5  # of a step
WINDOW = 5  # steps


class Alarms:
    """Looks at each step."""

    def __init__(
        self,
        mismatch_limit: float,
        max_failure_rate: float,
        faster_split: Callable[[Sequence[Metrics]], str | None],
    ) -> None:
        """`faster_split` gets the metrics of the last steps, and says what would be faster."""
        self._mismatch = mismatch_limit
        self._failures = max_failure_rate
        self._faster_split = faster_split
        self._recent: deque[Metrics] = deque(maxlen=WINDOW)
        self._entropies: list[float] = []  # of the first WINDOW steps
        self._steps_never_right = 0
        self._hacking = HackingWatch()
        # step of the newest warning of each kind that still holds
        self._last_said: dict[str, float] = {}

    def look(self, metrics: Metrics) -> list[str]:
        """Return what is to be said about this step."""
        checks = {
            "equal": (self._equal, "reward/equal_groups"),
            "kl": (self._kl, "kl"),
            "entropy": (self._entropy, "entropy"),
            "truncated": (self._truncated, "response_truncated"),
            "mismatch": (self._mismatched, "mismatch/mean"),
            "failed": (self._failed, "reward/failure_rate"),
            "never right": (self._never_right, "reward/mean"),
        }
        # A step in which no group trained has no KL, no entropy and no mismatch to judge.
        found = {kind: check(metrics) for kind, (check, key) in checks.items() if key in metrics}
        self._recent.append(metrics)
        found["wait"] = self._waiting()
        found["hacking"] = self._hacking.look(metrics)
        step = metrics["step"]
        said = []
        for kind, sentence in found.items():
            if sentence is None:
                self._last_said.pop(kind, None)
            elif step - self._last_said.get(kind, -REPEAT) >= REPEAT:
                self._last_said[kind] = step
                said.append(sentence)
        return said

    def _equal(self, m: Metrics) -> str | None:
        share = m["reward/equal_groups"]
        if share < EQUAL_GROUPS or _learned(m):
            return None
        return (
            f"in {share:.0%} of the groups all rewards are equal ({m['reward/mean']:+.2f} on "
            "average), so there is next to nothing to learn: the problems are too easy or too "
            "hard, the reward functions too coarse, or n_samples_per_prompt too small"
        )

    def _kl(self, m: Metrics) -> str | None:
        usual = float(np.median(self._same_reference(m) or [m["kl"]]))
        if m["kl"] > KL_LIMIT:
            return (
                f"the KL to the reference is {m['kl']:.2f} nats a token: the policy has left it "
                "far behind; lower lr or raise algorithm.kl_ctrl.kl_coef"
            )
        if m["kl"] > max(KL_NOTABLE, KL_GROWTH * usual):
            return (
                f"the KL to the reference jumped from {usual:.3f} to {m['kl']:.3f}: lower lr or "
                "clip_grad, and look at the samples of this step"
            )
        return None

    def _same_reference(self, m: Metrics) -> list[float]:
        """The KL of the last steps whose reference was that of this one: it begins anew with a reset."""
        version = m.get("reference_version")
        return [
            past["kl"]
            for past in self._recent
            if "kl" in past and past.get("reference_version") == version
        ]

    def _entropy(self, m: Metrics) -> str | None:
        if len(self._entropies) < WINDOW:
            self._entropies.append(m["entropy"])
        start = float(np.mean(self._entropies))
        if m["entropy"] > max(ENTROPY_HIGH, ENTROPY_GROWTH * start):
            return (
                f"entropy grew from {start:.3f} to {m['entropy']:.3f} nats a token: responses dissolve "
                "into chance; lower lr, entropy_coeff or clip_ratio_high"
            )
        is_low = m["entropy"] <= min(ENTROPY_LOW, ENTROPY_SHARE * start)  # NaN is not
        if not is_low or _learned(m):
            return None
        return (
            f"entropy fell from {start:.3f} to {m['entropy']:.3f} nats a token: responses of a "
            "group become copies of each other; raise temperature, entropy_coeff or "
            "clip_ratio_high"
        )

    def _truncated(self, m: Metrics) -> str | None:
        if m["response_truncated"] <= TRUNCATED:
            return None
        return (
            f"{m['response_truncated']:.0%} of the responses were cut at the length limit before "
            "their end: raise seq_length; or, where samples/ show texts that go on behind their "
            "answer, choose a prompt_type that suits the model, or name in actor_rollout.stop "
            "what it writes there (the log says at its start what ends a response)"
        )

    def _mismatched(self, m: Metrics) -> str | None:
        if not m["mismatch/mean"] > self._mismatch:  # NaN breaks an invariant, which says more
            return None
        return (
            f"log-probs of trainer and rollout engine differ by {m['mismatch/mean']:.2g} on "
            f"average, above {self._mismatch:g}: the samples are not those of the policy that is "
            "trained"
        )

    def _failed(self, m: Metrics) -> str | None:
        rate = m["reward/failure_rate"]
        if rate <= min(FAILED, self._failures):
            return None
        return (
            f"scoring failed for {rate:.1%} of the responses (the run stops above "
            f"reward.max_failure_rate {self._failures:g}): the column failure of samples/ says why"
        )

    def _never_right(self, m: Metrics) -> str | None:
        """Only what compares answers counts; a format that is always wrong is no riddle."""
        rights = [m[key] for key in ("reward/acc/right", "reward/base_acc/right") if key in m]
        if rights and not any(rights):
            self._steps_never_right = self._steps_never_right + 1
        else:
            self._steps_never_right = 0
        if self._steps_never_right < NEVER_RIGHT:
            return None
        return (
            f"no response was right in the last {self._steps_never_right} steps: look into "
            "samples/ whether ground_truth is an answer that a response can match "
            "(training.map_keys.response), and whether responses have \\boxed{}; if both are "
            "so, the problems are too hard for this model"
        )

    def _waiting(self) -> str | None:
        """The mean of a full window counts, so that one slow step does not."""
        if len(self._recent) < WINDOW:
            return None
        step = float(np.mean([m["time/step"] for m in self._recent]))
        wait = {}  # share of the step, by role
        for key in self._recent[-1]:
            if key.startswith(WAIT_KEY):
                seconds = float(np.mean([m[key] for m in self._recent]))
                wait[key.removeprefix(WAIT_KEY)] = seconds / step
        most = max(wait, key=lambda role: wait[role])
        if wait[most] <= WAIT:
            return None
        split = self._faster_split(list(self._recent))
        return split and f"{most} ranks wait {wait[most]:.0%} of the step for others; {split}"


def _learned(m: Metrics) -> bool:
    rights = [value for key, value in m.items() if key.endswith("/right")]
    return bool(rights) and min(rights) >= LEARNED
