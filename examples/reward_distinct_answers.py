"""A plain function is a reward function of a group: it sees all responses to one prompt.

    algorithm:
      verifier_function: [acc, examples/reward_distinct_answers.py:distinct_answers]
      verifier_weight: [1.0, 0.1]

`verifier_weight` brings its values in line; a keyword-only argument would be its setting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from r1zero.reward.boxes import extract_answer
from r1zero.reward.types import RewardInput


def distinct_answers(cases: Sequence[RewardInput]) -> list[float]:
    """Prefer answers that few others of the group have: 1 / number of responses with this answer.

    Nothing for a response without an answer.
    """
    answers = [extract_answer(case.response) for case in cases]
    counts = Counter(answers)
    return [0.0 if answer is None else 1.0 / counts[answer] for answer in answers]
