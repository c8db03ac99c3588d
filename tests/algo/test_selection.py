"""Which groups teach something: decided by verdicts, and never by what a failed score left."""

from __future__ import annotations

import numpy as np
import pytest

from r1zero.algo.selection import TeachingGroups, agreement
from r1zero.types import Agreement, Batch, Group, Outcome, Prompt, Sample, Score

OUTCOMES = {
    "+": Outcome.RIGHT,
    "-": Outcome.WRONG,
    "0": Outcome.NO_ANSWER,
    "c": Outcome.COPIED,
    "t": Outcome.TIMEOUT,
    "x": Outcome.CRASH,
}
ACC = ("acc",)


def group_of(acc: str, rewards: list[float] | None = None, other: str = "", cut: str = "") -> Group:
    """A group by the outcomes of `acc`, and of `other` if given; the samples `cut` are truncated."""
    prompt = Prompt(0, "", np.zeros(1, np.int32), "")
    samples = []
    for member, letter in enumerate(acc):
        outcome = OUTCOMES[letter]
        scores = {"acc": Score(float(outcome is Outcome.RIGHT), outcome)}
        if other:
            scores["other"] = Score(0.0, OUTCOMES[other[member]])
        scores["length"] = Score(0.1 * member, Outcome.GRADED)
        reward = rewards[member] if rewards else scores["acc"].value
        tokens = np.zeros(3, np.int32)
        truncated = str(member) in cut
        samples.append(Sample(tokens, np.zeros(3), truncated, 0, scores, reward=reward))
    return Group(0, prompt, samples)


def select(group: Group, limit: int | None = None, **keys: object) -> str:
    """Why the group is dropped, in a step whose responses stop at this limit."""
    batch = Batch(1, 0, [group.prompt], 4, 4, response_limit=limit)
    chosen = {"equal_groups": "keep", "accuracy": None, "mask_truncated": False} | keys
    selector = TeachingGroups(verdict_functions=ACC, **chosen)
    assert selector.select(batch, [group]) == [group] and group.trains == (not group.dropped)
    return group.dropped


def test_a_group_that_was_stopped_in_a_short_step_is_put_off_whatever_else_holds():
    """Of three tokens each; one that ended by itself is as short as it likes."""
    assert select(group_of("+--0", cut="2"), limit=3) == "put_off"
    assert select(group_of("++++", cut="0123"), limit=3, equal_groups="skip") == "put_off"
    assert select(group_of("+--0", cut="0123"), limit=3, mask_truncated=True) == "put_off"
    assert select(group_of("+--0", cut="2"), limit=4) == "", "an engine stopped it before"
    assert select(group_of("+--0", cut="2")) == "", "no short step"
    assert select(group_of("+--0"), limit=3) == ""


@pytest.mark.parametrize(
    ("acc", "expected"),
    [
        ("++++", Agreement.ALL_RIGHT),
        ("----", Agreement.ALL_WRONG),
        ("-0c-", Agreement.ALL_WRONG),  # no answer and a copied one are wrong, too
        ("+--0", Agreement.MIXED),
        ("+++c", Agreement.MIXED),
        ("+++t", Agreement.FAILED),
        ("---x", Agreement.FAILED),
    ],
)
def test_verdicts_agree_or_not(acc, expected):
    """The length makes all rewards differ, and changes nothing."""
    assert agreement(group_of(acc, rewards=[0.1, 0.2, 0.3, 0.4]), ACC) is expected


def test_several_functions_must_all_agree():
    both = ("acc", "other")
    assert agreement(group_of("++", other="++"), both) is Agreement.ALL_RIGHT
    assert agreement(group_of("++", other="--"), both) is Agreement.ALIKE
    assert agreement(group_of("++", other="+-"), both) is Agreement.MIXED


def test_without_a_verdict_the_rewards_decide():
    assert agreement(group_of("+-", rewards=[0.3, 0.3]), ()) is Agreement.ALIKE
    assert agreement(group_of("++", rewards=[0.3, 0.4]), ()) is Agreement.MIXED
    assert agreement(group_of("+t", rewards=[0.3, 0.3]), ()) is Agreement.FAILED


def test_skip_takes_groups_without_any_advantage():
    assert select(group_of("++++")) == ""
    assert select(group_of("++++"), equal_groups="skip") == "equal"
    assert select(group_of("-0-0", rewards=[-1, -1, -1, -1]), equal_groups="skip") == "equal"
    # all wrong, yet the rewards tell one from the other: an advantage would be lost
    assert select(group_of("----", rewards=[0, 0, 0.1, 0]), equal_groups="skip") == ""
    # rewards that happen to be equal
    assert select(group_of("+-", rewards=[0.5, 0.5]), equal_groups="skip") == ""
    assert select(group_of("---t"), equal_groups="skip") == ""


@pytest.mark.parametrize(
    ("acc", "dropped"),
    [("0---", True), ("+---", False), ("++--", False), ("+++-", True), ("+++t", False)],
)
def test_the_share_of_right_answers_is_within_its_bounds(acc, dropped):
    found = select(group_of(acc), accuracy=(0.25, 0.5))
    assert found == ("accuracy" if dropped else "")


def test_truncated_responses_are_left_out_one_by_one():
    group = group_of("+-+-", cut="13")
    select(group, mask_truncated=True)
    assert [sample.trains for sample in group.samples] == [True, False, True, False]
    assert group.training == [group.samples[0], group.samples[2]]
    assert select(group_of("+-", cut="01"), mask_truncated=True) == "truncated"
    assert select(group_of("+-", cut="01")) == ""


def test_what_a_checkpoint_held_is_decided_anew():
    group = group_of("++++", cut="0")
    select(group, equal_groups="skip", mask_truncated=True)
    assert group.training == []
    select(group)
    assert group.training == group.samples


def test_replace_goes_by_verdicts_alone():
    shaped = [0.0, 0.1, 0.2, 0.3]
    assert select(group_of("----", rewards=shaped), equal_groups="replace") == "equal"
    assert select(group_of("++++", rewards=shaped), equal_groups="replace") == "equal"
    assert select(group_of("+---", rewards=[1, 1, 1, 1]), equal_groups="replace") == ""
    assert select(group_of("---t"), equal_groups="replace") == ""
