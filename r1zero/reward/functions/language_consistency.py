"""Language consistency: the thought in one language (DeepSeek-R1, arXiv:2501.12948, 2.3.2)."""

from __future__ import annotations

import re
from typing import Literal

from r1zero.config.keys import OneOf
from r1zero.reward.functions import reward_function
from r1zero.reward.types import RewardInput

_COMMAND = re.compile(r"\\[A-Za-z]+")  # of LaTeX: \frac is no word of any language
# A word of two letters or more, since single ones are variables; or a Chinese character.
_WORDS = {"en": re.compile(r"[A-Za-z]{2,}"), "zh": re.compile(r"[\u3400-\u9fff]")}


@reward_function(scope="sample")
def language_consistency(
    case: RewardInput,
    *,
    language: OneOf[Literal["en", "zh"]] = "en",  # that the thought is to be in
) -> float:
    """The share of the words of the thought that are of `language`, from 0 to 1; 0 without words.

    A Chinese character counts as a word. The thought is what stands before `</think>`, or all of a
    response without it.
    """
    thought = _COMMAND.sub(" ", case.response.partition("</think>")[0].replace("<think>", " "))
    counts = {each: len(words.findall(thought)) for each, words in _WORDS.items()}
    return counts[language] / max(1, sum(counts.values()))
