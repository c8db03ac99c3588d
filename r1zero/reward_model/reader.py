"""What reads groups on the ranks of the reward model: rendering, the model, one value for a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np

from r1zero.policy.reward_model import RewardModel, Text
from r1zero.reward_model.judge import Values
from r1zero.reward_model.rendering import Rendering, common_prefix
from r1zero.types import Group

OfSteps = Literal["min", "mean", "last"]


@dataclass(frozen=True, slots=True)
class Reader:
    """Gives the values of groups. One that is rendered to more than `limit` tokens has none."""

    model: RewardModel
    rendering: Rendering
    limit: int
    step_token: int | None  # of a process reward model
    of_steps: OfSteps

    def values(self, groups: Sequence[Group]) -> dict[int, Values]:
        """See GroupReader: collective over the replica of the reward model."""
        rendered = [self.rendering.tokens(group) for group in groups]
        asked = [self._distinct(tokens) for tokens in rendered]
        texts: list[Text] = []
        for distinct in asked:
            texts += self._texts(list(distinct.values()))
        found = iter(self._valued(texts))
        if not self.model.model.grid.is_last_stage:
            return {}
        values: dict[int, Values] = {}
        for group, tokens, distinct in zip(groups, rendered, asked, strict=True):
            known = {key: next(found) for key in distinct}
            values[group.position] = [known.get(each.tobytes()) for each in tokens]
        return values

    def _distinct(self, rendered: Sequence[np.ndarray]) -> dict[bytes, np.ndarray]:
        """Those that the model can read, each once. Equal ones must have equal values to the last bit:
        a group normalised by its deviation would make rewards of rounding."""
        return {each.tobytes(): each for each in rendered if self._fits(each)}

    def _fits(self, tokens: np.ndarray) -> bool:
        return 2 <= len(tokens) <= self.limit

    def _texts(self, rendered: Sequence[np.ndarray]) -> list[Text]:
        """What the model reads of a group: what all begin with once, as their prompt."""
        if not rendered:
            return []
        marks = [self._marks(tokens) for tokens in rendered]
        ends = [common_prefix(rendered), *(places[0] for places in marks if len(places))]
        shared = max(1, min(ends))  # a prompt has a token
        return [
            Text(tokens[:shared], tokens[shared:], marks=(places - shared).tolist())
            for tokens, places in zip(rendered, marks, strict=True)
        ]

    def _marks(self, tokens: np.ndarray) -> np.ndarray:
        """Where the steps end, if the model values steps."""
        if self.step_token is None:
            return np.empty(0, np.int64)
        return np.flatnonzero(tokens == self.step_token)

    def _valued(self, texts: Sequence[Text]) -> list[float]:
        """The value of each text, on the last stage."""
        if self.step_token is None:
            return self.model.values(texts)
        return [self._of_steps(steps) for steps in self.model.step_probabilities(texts)]

    def _of_steps(self, steps: Sequence[float]) -> float:
        """The value of a response, of those of its steps."""
        if self.of_steps == "min":
            return min(steps)
        if self.of_steps == "mean":
            return fmean(steps)
        return steps[-1]
