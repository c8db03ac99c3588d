"""Expected lengths: how long the answers to a prompt will be, guessed from those that it got last.

A minibatch can be learnt from when its longest answer has ended. Where prompts are dealt to
minibatches as they are drawn, each minibatch has a long answer, and all of them end at the tail;
dealt by expected length, the first ones end early. The deal is made before generation starts, so
which samples are learnt from together does not depend on which ended first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from r1zero.types import Prompt


@dataclass(frozen=True, slots=True)
class _Seen:
    """A prompt as it was last seen."""

    prompt_tokens: int
    response_tokens: float  # mean over its responses


class ExpectedLengths:
    """What the steps so far told about lengths. Kept by the controller, and in its checkpoints.

    A prompt is known by its index. Of one that was not seen yet, the answer is expected to be as
    long as answers are in general, in proportion to the prompt: prompts of 10 and 30 tokens with
    answers of 100 and 140 on average make 6 tokens of answer for each of the prompt, so a new
    prompt of 20 stands between them with 120.
    """

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}
        self._longest: list[int] = []  # response of each group of the last step, ascending

    def record(self, prompts: Sequence[Prompt], lengths: Sequence[Sequence[int]]) -> None:
        """Take what a step brought: of each prompt of its batch [P], the tokens of its responses
        [P][G]. Of a prompt that was drawn twice the later one counts."""
        for prompt, group in zip(prompts, lengths, strict=True):
            mean = sum(group) / len(group)
            self._seen[prompt.index] = _Seen(len(prompt.tokens), mean)
        self._longest = sorted(max(group) for group in lengths)

    def order(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts by expected length, the shortest first; equals stay in their order."""
        ratio = self._ratio()

        def expected(prompt: Prompt) -> float:
            if seen := self._seen.get(prompt.index):
                return seen.response_tokens
            return len(prompt.tokens) * ratio

        return sorted(prompts, key=expected)

    def longest(self, default: int) -> int:
        """Tokens of the longest response of the last step; `default` before the first."""
        if not self._longest:
            return default
        return self._longest[-1]

    def typical(self, default: int) -> int:
        """Tokens of the longest response of a group in the last step, on average and at least 1;
        `default` before the first."""
        if not self._longest:
            return max(1, default)
        return max(1, round(sum(self._longest) / len(self._longest)))

    def state(self) -> dict[str, np.ndarray]:
        """All of it, as arrays for a checkpoint."""
        seen = self._seen.values()
        return {
            "index": np.array(list(self._seen), np.int64),
            "prompt_tokens": np.array([prompt.prompt_tokens for prompt in seen], np.int64),
            "response_tokens": np.array([prompt.response_tokens for prompt in seen], np.float64),
            "longest": np.array(self._longest, np.int64),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from `state`. What it says of prompts that are no longer there does no harm."""
        columns = (state[name].tolist() for name in ("index", "prompt_tokens", "response_tokens"))
        self._seen = {
            index: _Seen(prompt_tokens, response_tokens)
            for index, prompt_tokens, response_tokens in zip(*columns, strict=True)
        }
        self._longest = state["longest"].tolist()

    def _ratio(self) -> float:
        """Response tokens for each token of a prompt, of all that were seen; 1 before the first.

        `fsum` is exact, so the order in which prompts were seen does not show.
        """
        prompt_tokens = sum(seen.prompt_tokens for seen in self._seen.values())
        response_tokens = math.fsum(seen.response_tokens for seen in self._seen.values())
        if prompt_tokens == 0:
            return 1.0
        return response_tokens / prompt_tokens
