"""The limit of failures: a run whose reward functions fail too often stops, and says so."""

from __future__ import annotations

from collections import Counter, deque

from r1zero.types import SampleSummary

WINDOW = 500  # responses


class FailureGuard:
    """Counts failures over the newest steps that hold at least WINDOW responses together, or over
    all so far.

    The run stops when more than rate * max(WINDOW, their responses) of them have a score that
    failed: with 0.05 at the 26th failure within 500 responses. One failure in a tiny step does not
    stop a run; with rate 0 it does, with rate 1 nothing does.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._steps: deque[SampleSummary] = deque()

    def check(self, samples: SampleSummary) -> None:
        """Count the samples of a step. RuntimeError when too many of the window have failed."""
        self._steps.append(samples)
        total = sum(step.samples for step in self._steps)
        while total - self._steps[0].samples >= WINDOW:
            total -= self._steps.popleft().samples
        failed = sum(step.failed for step in self._steps)
        if failed > self._rate * max(WINDOW, total):
            reasons = sum((step.reasons for step in self._steps), Counter())
            most, times = reasons.most_common(1)[0]
            raise RuntimeError(
                f"scoring failed for {failed} of the last {total} responses, {times} "
                f"times with `{most}`: more than reward.max_failure_rate {self._rate:g} allows "
                f"(counted over at least {WINDOW}); the columns outcome/* and failure of samples/ "
                "in the run folder tell which, tools/rescore.py scores them again"
            )
