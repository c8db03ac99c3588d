"""Retention: which checkpoints, and which models exported on the way, are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Scores = Mapping[str, float]  # of an evaluation, by their keys in evaluation.jsonl


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """The newest ones are kept, those of every so many steps, and those with the best scores."""

    keep_last: int | None  # None: all
    keep_every: int | None = None
    keep_best: int | None = None
    best_score: str = ""  # the higher the better

    def spare(self, found: Mapping[int, Scores | None]) -> list[int]:
        """The steps that are not kept, of those that there are, with their scores if they were
        evaluated; ascending.

        Steps 1 to 6 without 3 scored 1, 5, -, 2, 5, 1: with keep_last 1 and keep_best 2, the steps
        1, 3 and 4 are not kept.
        """
        steps = sorted(found)
        if self.keep_last is None:
            return []
        kept = set(steps[-self.keep_last :])
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        kept |= set(self.best(found)[: self.keep_best or 0])
        return [step for step in steps if step not in kept]

    def best(self, found: Mapping[int, Scores | None]) -> list[int]:
        """The steps that have the score, the best first; of equal ones the earlier."""
        scored = {}
        for step, scores in found.items():
            if scores is not None and self.best_score in scores:
                scored[step] = scores[self.best_score]
        return sorted(scored, key=lambda step: (-scored[step], step))
