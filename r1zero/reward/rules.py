"""The table of reward functions: a name, what it looks at, what its verdicts are worth.

Two kinds: a check gives a verdict, right or wrong; a grade is a value without one. Some look at a
response by itself, as soon as it is finished, others at all responses to a prompt together with the
verdicts on them. Only the processes of the reward executor call scorers, since a hostile answer can
hang or kill one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from r1zero.config.own_code import is_own, place_problems, short_name
from r1zero.config.schema import Accuracy, Reward
from r1zero.errors import BadInput, nearest
from r1zero.reward import custom, shaping
from r1zero.reward import format as shape
from r1zero.reward.types import CustomReward, RewardInput
from r1zero.types import Outcome, Score

Check = Callable[[RewardInput], float]  # credit from 0 to 1


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """Scores a batch of responses, in order."""

    score: Callable[[Sequence[RewardInput]], list[Score]]
    # value of a response on which the scorer times out or crashes: never more than the worst
    failed: float
    # takes all responses to a prompt, judged by the others; if it fails, all get 0
    whole_group: bool = False


def _check(check: Check, right: float = 1.0, wrong: float = 0.0) -> RewardFunction:
    """Make a scorer of a check. Credit in between is worth a value in between."""

    def score(case: RewardInput) -> Score:
        credit = check(case)
        if credit >= 1:
            return Score(right, Outcome.RIGHT)
        return Score(wrong + credit * (right - wrong), Outcome.WRONG)

    return RewardFunction(lambda cases: [score(case) for case in cases], wrong)


def _accuracy(values: Accuracy) -> RewardFunction:
    """Make a scorer of the verdict on the answer."""
    worth = {
        Outcome.RIGHT: values.right,
        Outcome.WRONG: values.wrong,
        Outcome.COPIED: values.wrong,
        Outcome.NO_ANSWER: values.missing,
    }

    def score(case: RewardInput) -> Score:
        outcome = verdict(case, values.copied_span == "right")
        return Score(worth[outcome], outcome)

    return RewardFunction(lambda cases: [score(case) for case in cases], values.wrong)


def _grade(grade: Callable[[RewardInput], float], worst: float) -> RewardFunction:
    return RewardFunction(
        lambda cases: [Score(grade(case), Outcome.GRADED) for case in cases], worst
    )


def _grade_group(grade: CustomReward) -> RewardFunction:
    return RewardFunction(
        lambda cases: [Score(value, Outcome.GRADED) for value in grade(cases)],
        0.0,
        whole_group=True,
    )


def verdict(case: RewardInput, copies_are_right: bool = False) -> Outcome:
    """Compare the boxed answer with the right one, and one that is right with the question."""
    # sympy takes a second to import; only the reward executor's processes judge, so only they pay
    # for it.
    from r1zero.reward.copied import is_copied
    from r1zero.reward.math.grade import same

    given = shape.extract_answer(case.response)
    if given is None:
        return Outcome.NO_ANSWER
    if not same(case.gold, given):
        return Outcome.WRONG
    if not copies_are_right and is_copied(case.prompt, case.gold, given):
        return Outcome.COPIED
    return Outcome.RIGHT


def _one_or_zero(reward: Reward) -> Accuracy:
    return replace(reward.accuracy, right=1.0, wrong=0.0, missing=0.0)


REWARD_FUNCTIONS: dict[str, Callable[[Reward], RewardFunction]] = {
    "acc": lambda reward: _accuracy(reward.accuracy),
    "base_acc": lambda reward: _accuracy(_one_or_zero(reward)),
    "format": lambda _: _check(lambda case: float(shape.full_format(case.response))),
    "strict_format": lambda _: _check(
        lambda case: float(shape.strict_format(case.response)), wrong=-1.0
    ),
    "reasoning_steps": lambda _: _check(lambda case: shape.reasoning_steps(case.response)),
    "length": lambda _: _grade_group(shaping.length),
    "cosine": lambda reward: _grade_group(partial(shaping.cosine, values=reward.cosine)),
    "overlong": lambda reward: _grade(
        partial(shaping.overlong, cache_tokens=reward.overlong_cache), -1.0
    ),
    "repetition": lambda reward: _grade(
        partial(shaping.repetition, ngram=reward.repetition_ngram), -1.0
    ),
}
# the name that older configurations use
REWARD_FUNCTIONS["step"] = REWARD_FUNCTIONS["reasoning_steps"]

VERDICTS = ("acc", "base_acc")  # either tells the others which responses are right
NEED_VERDICT = ("length", "cosine")
NEED_TOKENS = ("length", "cosine", "overlong")


def shown_name(name: str) -> str:
    """Return what metrics and samples call a scorer."""
    if is_own(name):
        return short_name(name)
    return name


def check_names(names: Sequence[str]) -> list[str]:
    """Return a sentence for everything that is wrong with a list of scorers."""
    problems = []
    for name in names:
        if is_own(name):
            problems += place_problems(name)
        elif name not in REWARD_FUNCTIONS:
            problems.append(
                f"{name} is not one of "
                f"{', '.join(REWARD_FUNCTIONS)}{nearest(name, REWARD_FUNCTIONS)}; a scorer of "
                "your own is package.module:function or path/to/file.py:function"
            )
        elif name in NEED_VERDICT and not set(VERDICTS) & set(names):
            problems.append(f"{name} depends on which responses are right: name acc, too")
    if not names or len({shown_name(name) for name in names}) < len(names):
        problems.append(f"{list(names)} must name at least one scorer, and each once")
    return problems


def select(names: Sequence[str], reward: Reward) -> dict[str, RewardFunction]:
    """Return the named scorers in order, by their shown names. BadInput for names that cannot
    be."""
    for problem in check_names(names):
        raise BadInput(problem)
    return {
        shown_name(name): _grade_group(partial(custom.grade, name))
        if is_own(name)
        else REWARD_FUNCTIONS[name](reward)
        for name in names
    }
