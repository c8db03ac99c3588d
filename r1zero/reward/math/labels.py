r"""What only names the answer before an equals sign: `x`, `f(x)`, `(p, q)`, `S:T`,
`\text{Area}`."""

from __future__ import annotations

import re

from r1zero.reward.math.tokens import GREEK

_INDEX = r"(?: ?_ ?(?:[A-Za-z0-9]|\{[^{}]{1,20}\}))?"
_LABEL = re.compile(
    r"(?:\\text ?\{[^{}]+\}|\\frac ?\{ ?d ?[a-z]? ?\} ?\{ ?d ?[a-z] ?\}"
    r"|\\overline ?\{ ?[A-Z]+ ?\}|\|[A-Z]+\||m [A-Z]+"
    r"|\\(?!text|frac|over)(?P<command>[A-Za-z]+)|[A-Z]+|[A-Za-z](?:[a-z]{2,})?|[\u3400-\u9fff]+)"
    rf"(?: ?\^ ?\{{? ?(?:-1|T|\\top) ?\}}?)?{_INDEX}'*(?: ?\([^()]{{1,20}}\))?"
)
_POINT = re.compile(r"[A-Z]? ?\( ?[a-z](?: ?, ?[a-z])* ?\)")
_MEMBER = (  # of a quotient
    r"\|?(?:\\overline ?\{ ?[A-Z]+ ?\}|\\text ?\{[^{}]+\}|[A-Z]{1,3}|[A-Za-z][a-z]{2,}|[a-df-hj-z])"
    rf"'*{_INDEX}\|?"
)
_QUOTIENT = re.compile(
    rf"\\frac ?\{{ ?(?P<top>{_MEMBER}) ?\}} ?\{{ ?(?P<bottom>{_MEMBER}) ?\}}"
    rf"|{_MEMBER}(?: ?/ ?{_MEMBER}|(?: ?: ?{_MEMBER})+)"
)


def is_label(text: str) -> bool:
    """Tell whether a cleaned text may be the name of an answer of any kind."""
    if _POINT.fullmatch(text):
        return True
    match = _LABEL.fullmatch(text)
    if match is None or text in ("e", "i"):
        return False
    return match["command"] is None or match["command"] in GREEK


def coordinates(text: str) -> list[str]:
    """Return the letters of a point, (p, q); [] for any other name."""
    if _POINT.fullmatch(text):
        return re.findall("[a-z]", text)
    return []


def name_of(text: str) -> str:
    r"""Return a name without spaces, NO:BO for the quotient `\frac{NO}{BO}`; "" for what is no
    name."""
    match = _QUOTIENT.fullmatch(text)
    if match is None:
        if is_label(text):
            return "".join(text.split())
        return ""
    if match["top"]:
        name = f"{match['top']}:{match['bottom']}"
    else:
        name = text
    return re.sub(r"\\text|\\overline|[{}| ]", "", name).replace("/", ":")
