r"""The parts of a response: its last box, its answer.

Nothing here knows mathematics, and everything takes time linear in the text.
"""

from __future__ import annotations

import re

from r1zero.reward.visible import is_visible

# One alternative per thing that opens or closes; `\\.` swallows escaped braces and double
# backslashes.
_BRACES = re.compile(
    r"(?P<box>\\{1,2}(?:boxed|fbox)\s*\{)"
    r"|(?P<bare>\\{1,2}(?:boxed|fbox)(?: +|(?=[0-9$+-]))"
    r"(?P<content>[$+-]{0,2}[0-9][0-9.,/]*|[A-Z](?=\s*(?:$|[$<\n.]))))"
    r"|\\.|(?P<open>\{)|(?P<close>\})",
    re.DOTALL,
)
_BOX = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{")


def last_box(text: str, bare: bool = False) -> str | None:
    r"""Return the content of the last complete, outermost `\boxed{...}` or `\fbox{...}`, or None.

    Braces nest, `\{` and `\}` do not count, white space may stand before the brace, the backslash
    may be doubled. A box that is never closed is no box. Boxes inside the box lose their command
    and keep their braces. With `bare`, a number or a capital letter needs no braces, as in `\boxed
    5`.
    """
    start = end = -1
    opened: list[int] = []  # where the content of an open brace starts; negative for a plain brace
    for match in _BRACES.finditer(text):
        if match["box"]:
            opened.append(match.end())
        elif match["bare"]:
            if bare:
                start, end = match.span("content")
        elif match["open"]:
            opened.append(-1)
        elif match["close"] and opened:
            content = opened.pop()
            if content >= 0:
                start = content
                end = match.start()
    if end < 0:
        return None
    return _BOX.sub("{", text[start:end]).strip()


def answer_part(response: str) -> str:
    """Return what stands in the last `<answer>`, closed or cut off; the whole text if there is
    none."""
    start = response.rfind("<answer>")
    if start < 0:
        return response
    return response[start + len("<answer>") :].split("</answer>", 1)[0]


def extract_answer(response: str) -> str | None:
    r"""Return the answer in the last complete box; None where there is none, or nothing to see in
    it.

    Where an `<answer>` is, only the last of them counts: a box in the reasoning is not the answer.
    Without one, the whole response does. `\boxed 5` is a box too. There is no other fallback: a
    number that is in no box is no answer, however it is introduced.
    """
    answer = last_box(answer_part(response), bare=True)
    if answer and is_visible(answer):
        return answer
    return None
