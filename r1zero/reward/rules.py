"""The table of scorers: a name, what it looks at, what its verdicts are worth.

A check returns credit from 0 to 1, or None when there is no answer to check. A rule turns that into a
Score. Only the processes of the judge call rules, since a hostile answer can hang or kill one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from r1zero.batch import Outcome, Score
from r1zero.reward import format as shape

Check = Callable[[str, str], float | None]


@dataclass(frozen=True, slots=True)
class AccuracyValues:
    """What a right answer, a wrong one and none at all are worth."""

    right: float = 1.0
    wrong: float = -1.0
    missing: float = -1.0


@dataclass(frozen=True, slots=True)
class Rule:
    """A check with its values. Credit in between is worth a value in between."""

    check: Check
    values: AccuracyValues

    def __call__(self, response: str, answer: str) -> Score:
        """Score a response against the right answer."""
        credit, values = self.check(response, answer), self.values
        if credit is None:
            return Score(values.missing, Outcome.NO_ANSWER)
        if credit >= 1:
            return Score(values.right, Outcome.RIGHT)
        return Score(values.wrong + credit * (values.right - values.wrong), Outcome.WRONG)

    def failure(self, outcome: Outcome) -> Score:
        """Return what a check that ended with TIMEOUT or CRASH is worth: no more than a wrong answer."""
        assert outcome.failed
        return Score(self.values.wrong, outcome)


def accuracy(response: str, answer: str) -> float | None:
    """Compare the boxed answer with the right one."""
    # sympy takes a second to import; only the judge's processes judge, so only they pay for it.
    from r1zero.reward.math_answer import same

    given = shape.extract_answer(response)
    return None if given is None else float(same(answer, given))


RULES: dict[str, Rule] = {
    "acc": Rule(accuracy, AccuracyValues()),
    "base_acc": Rule(accuracy, AccuracyValues(1.0, 0.0, 0.0)),
    "format": Rule(lambda response, _: float(shape.full_format(response)), AccuracyValues(1.0, 0.0, 0.0)),
    "strict_format": Rule(lambda response, _: float(shape.strict_format(response)), AccuracyValues()),
    "reasoning_steps": Rule(
        lambda response, _: shape.reasoning_steps(response), AccuracyValues(1.0, 0.0, 0.0)
    ),
}
RULES["step"] = RULES["reasoning_steps"]  # the name that older configurations use


def select_rules(names: Sequence[str], values: AccuracyValues = AccuracyValues()) -> dict[str, Rule]:
    """Return the named rules in order, `acc` with the values given; raise ValueError for an unknown name."""
    for name in names:
        if name not in RULES:
            near = get_close_matches(name, RULES, 1, 0.0)[0]
            raise ValueError(
                f"reward.verifier_function: no scorer '{name}'; did you mean '{near}'? "
                f"There are {', '.join(RULES)}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"reward.verifier_function: {list(names)} names a scorer twice; name each once")
    table = RULES | {"acc": replace(RULES["acc"], values=values)}
    return {name: table[name] for name in names}
