"""Format: a thought and an answer with a box, in their tags."""

from __future__ import annotations

from r1zero.reward.boxes import answer_part, last_box
from r1zero.reward.functions import checked, reward_function
from r1zero.reward.types import RewardInput
from r1zero.reward.visible import is_visible
from r1zero.scores import Score

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def full_format(response: str) -> bool:
    r"""Tell whether the response is `<think>..</think>`, white space or nothing,
    `<answer>..</answer>`.

    It starts with `<think>`; each of the four tags stands in it once; the answer holds a complete
    `\boxed{...}`; after `</answer>` only white space may follow. There is something to see in the
    thought and in the box.
    """
    text = response.rstrip()
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    if not (text.startswith("<think>") and text.endswith("</answer>")):
        return False
    thought, _, rest = text.removeprefix("<think>").partition("</think>")
    return (
        "<answer>" not in thought
        and rest.lstrip().startswith("<answer>")
        and is_visible(last_box(answer_part(text)) or "")
        and is_visible(thought)
    )


@reward_function(scope="sample")
def format(case: RewardInput) -> Score:
    """1 for the full format, else 0."""
    return checked(float(full_format(case.response)))
