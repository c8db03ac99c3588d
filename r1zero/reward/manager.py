"""The reward manager: finished samples go to the executor, scores come back by group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from r1zero.reward.executor import RewardExecutor
from r1zero.reward.types import RewardInput
from r1zero.types import Group


class RewardManager:
    """Scores the samples of a rollout replica. Without a reward executor (ranks that do not speak)
    it does nothing."""

    def __init__(
        self,
        executor: RewardExecutor | None,
        decode: Callable[[np.ndarray], str],
        limit: int,
        notes_values: bool = False,
    ) -> None:
        """With `notes_values`, samples take the values of the reward functions along."""
        self._executor = executor
        self._decode = decode
        self._limit = limit
        self._notes_values = notes_values

    @property
    def functions(self) -> list[str]:
        """All reward functions, by the names that scores have."""
        if self._executor is None:
            return []
        return self._executor.functions

    @property
    def verdict_functions(self) -> list[str]:
        """The reward functions that say whether a response is right."""
        if self._executor is None:
            return []
        return self._executor.verdict_functions

    def submit(self, group: Group, member: int) -> None:
        """Queue a finished sample: it is scored while generation goes on."""
        if self._executor is None:
            return
        sample = group.samples[member]
        case = RewardInput(
            group.prompt.text,
            self._decode(sample.tokens),
            group.prompt.answer,
            tokens=len(sample.tokens),
            limit=self._limit,
            truncated=sample.truncated,
            row=group.prompt.row or {},
            source=group.prompt.source,
        )
        self._executor.submit(group.position, member, len(group.samples), case)

    def poll(self) -> None:
        """Keep the reward executor's workers busy; cheap enough to call after every decoding
        step."""
        if self._executor is not None:
            self._executor.poll()

    def score(self, groups: list[Group]) -> list[Group]:
        """Wait for the scores of these groups and note them and the reward in every sample.

        The data row of a prompt ends here: nothing behind this looks at it. Groups that have scores,
        from a checkpoint, keep them.
        """
        if self._executor is None:
            return groups
        waiting = [group for group in groups if not group.samples[0].scores]
        found = self._executor.collect([group.position for group in waiting])
        for group in waiting:
            if group.prompt.row is not None:
                group.prompt = replace(group.prompt, row=None)
            for sample, scores in zip(group.samples, found[group.position], strict=True):
                sample.scores = scores
                sample.reward = self._executor.reward(scores, group.prompt.source)
        for group in groups:
            for sample in group.samples:
                sample.right = self._executor.verdict(sample.scores) is True
                if self._notes_values:
                    sample.score_values = self._executor.values(sample.scores)
        return groups

    def close(self) -> None:
        """End the reward executor's workers."""
        if self._executor is not None:
            self._executor.close()
