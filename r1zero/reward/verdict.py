"""The verdict on a response: is the answer in its box the right one?"""

from __future__ import annotations

from r1zero.reward.boxes import extract_answer
from r1zero.reward.types import RewardInput
from r1zero.scores import Outcome


def verdict(case: RewardInput, copies_are_right: bool = False) -> Outcome:
    """Compare the boxed answer with the right one, and one that is right with the question."""
    # sympy takes a second to import; only the reward executor's processes compare, so only they
    # pay for it.
    from r1zero.reward.math.grade import is_copied, same

    given = extract_answer(case.response)
    if given is None:
        return Outcome.NO_ANSWER
    if not same(case.gold, given):
        return Outcome.WRONG
    if not copies_are_right and is_copied(case.prompt, case.gold, given):
        return Outcome.COPIED
    return Outcome.RIGHT
