"""Between engine and judge: samples go to the judge as they are finished, scores come back by group."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from r1zero.batch import Group
from r1zero.reward.judge import Judge


class Scorer:
    """Scores the samples of one rollout replica. Without a judge (ranks that do not speak) it does nothing."""

    def __init__(self, judge: Judge | None, decode: Callable[[np.ndarray], str]) -> None:
        self._judge, self._decode = judge, decode

    def submit(self, group: Group, member: int) -> None:
        """Queue a finished sample: it is judged while generation goes on."""
        if self._judge is not None:
            self._judge.submit((group.position, member), self._decode(group.samples[member].tokens), group.prompt.answer)

    def poll(self) -> None:
        """Keep the judge's workers busy; cheap enough to call after every decoding step."""
        if self._judge is not None:
            self._judge.poll()

    def score(self, groups: list[Group]) -> list[Group]:
        """Wait for the scores of these groups and note them and the reward in every sample."""
        if self._judge is None:
            return groups
        found = self._judge.collect([(g.position, member) for g in groups for member in range(len(g.samples))])
        for (position, member), scores in found.items():
            sample = next(g for g in groups if g.position == position).samples[member]
            sample.scores, sample.reward = scores, self._judge.reward(scores)
        return groups

    def close(self) -> None:
        """End the judge's workers."""
        if self._judge is not None:
            self._judge.close()
