"""Between engine and judge: samples go to the judge as they are finished, scores come back by group."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from r1zero.types import Group
from r1zero.reward.types import Case
from r1zero.reward.executor import Judge


class SampleScorer:
    """Scores the samples of a rollout replica. Without a judge (ranks that do not speak) it does nothing."""

    def __init__(self, judge: Judge | None, decode: Callable[[np.ndarray], str], limit: int) -> None:
        self._judge, self._decode, self._limit = judge, decode, limit

    def submit(self, group: Group, member: int) -> None:
        """Queue a finished sample: it is judged while generation goes on."""
        if self._judge is None:
            return
        sample = group.samples[member]
        case = Case(group.prompt.text, self._decode(sample.tokens), group.prompt.answer,
                    tokens=len(sample.tokens), limit=self._limit, truncated=sample.truncated)
        self._judge.submit(group.position, member, len(group.samples), case)

    def poll(self) -> None:
        """Keep the judge's workers busy; cheap enough to call after every decoding step."""
        if self._judge is not None:
            self._judge.poll()

    def score(self, groups: list[Group]) -> list[Group]:
        """Wait for the scores of these groups and note them and the reward in every sample."""
        if self._judge is None:
            return groups
        found = self._judge.collect([group.position for group in groups])
        for group in groups:
            for sample, scores in zip(group.samples, found[group.position], strict=True):
                sample.scores, sample.reward = scores, self._judge.reward(scores)
        return groups

    def close(self) -> None:
        """End the judge's workers."""
        if self._judge is not None:
            self._judge.close()
