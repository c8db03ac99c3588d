"""The limit of failures: a run whose reward functions fail too often stops, and says so."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from r1zero.types import Group

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
        self._steps: deque[tuple[int, Counter[str]]] = deque()  # (responses, failures by reason)

    def check(self, groups: Sequence[Group]) -> None:
        """Count the samples of a step. RuntimeError when too many of the window have failed."""
        samples = [sample for group in groups for sample in group.samples]
        self._steps.append(
            (len(samples), Counter(sample.failure for sample in samples if sample.failed))
        )
        total = sum(count for count, _ in self._steps)
        while total - self._steps[0][0] >= WINDOW:
            total -= self._steps.popleft()[0]
        reasons = sum((failures for _, failures in self._steps), Counter())
        if reasons.total() > self._rate * max(WINDOW, total):
            most, times = reasons.most_common(1)[0]
            raise RuntimeError(
                f"scoring failed for {reasons.total()} of the last {total} responses, {times} "
                f"times with `{most}`: more than reward.max_failure_rate {self._rate:g} allows "
                f"(counted over at least {WINDOW}); the columns outcome/* and failure of samples/ "
                "in the run folder tell which, tools/rescore.py scores them again"
            )
