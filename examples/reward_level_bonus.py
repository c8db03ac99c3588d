"""A reward function of one's own that has settings and sees a column of the data.

Right answers to hard problems are worth more:

    algorithm:
      verifier_function: [acc, examples/reward_level_bonus.py:level_bonus]
      verifier_weight: [1.0, 1.0]
    reward:
      settings: {level_bonus: {bonus: 0.25, from_level: 4}}
"""

from __future__ import annotations

from typing import Annotated

from r1zero.config.keys import Count, Number, between
from r1zero.reward.functions import reward_function
from r1zero.reward.types import RewardInput


@reward_function(scope="sample", columns=("level",), needs_verdict=True)
def level_bonus(
    case: RewardInput,
    *,
    bonus: Annotated[Number, between(0, 10, 0.5)] = 0.5,  # for each level from `from_level` on
    from_level: Count = 3,
) -> float:
    """`bonus` for each level, from `from_level` on, of a problem whose answer is right; else 0.

    The column `level` holds a number, or a text that ends with one, as MATH's "Level 5".
    """
    level = int(str(case.row["level"]).split()[-1])
    if not case.right:
        return 0.0
    return bonus * max(0, level - from_level + 1)
