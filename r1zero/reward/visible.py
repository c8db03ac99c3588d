r"""Whether a text shows anything: not `\,`, `\phantom{5}`, `&nbsp;`, a zero-width space or dots.

Takes time linear in the text, and mostly looks at its first word only.
"""

from __future__ import annotations

import html
import re
import unicodedata

_GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"
_HIDING = (  # commands that hide what they take, or only measure it
    r"\\(?:m?kern|[mhv]skip)\s*[-+]?[\d.]+\s*[a-z]{2}"  # TeX's own lengths have no braces
    r"|\\(?:[hv]?phantom|smash|[hv]space|[hv]skip|kern|label|rule|scalebox|resizebox|fontsize)"
    rf"\*?(?:\s*{_GROUP})*"
    rf"|\\(?:text)?color\s*\{{\s*(?:white|transparent)\s*\}}\s*(?:{_GROUP}|[^{{}}]*)"
    r"|<!--.*?-->|</?[A-Za-z][^<>]*>|(?<!\\)%[^\n]*|[{}()\[\].,;:!?'_-]+"
)
_TOKEN = re.compile(
    rf"(?P<hidden>{_HIDING}"
    r"|\\(?:begin|end|(?:text)?color|f?colorbox)\s*\{[^{}]*\}|\\[^A-Za-z{}$%&#])"
    r"|\\(?P<command>[A-Za-z]+)|(?P<entity>&(?:[A-Za-z]+|#[0-9]+|#x[0-9A-Fa-f]+);)|(?P<sign>\\?\S)",
    re.DOTALL,
)
_FRAMES = frozenset(  # commands that show nothing by themselves
    "text textbf textit textrm textsf texttt textnormal mathrm mathbf mathit mathsf mathtt "
    "mathcal mathbb boldsymbol bm operatorname mbox hbox boxed fbox left right big Big bigg "
    "Bigg bigl bigr Bigl Bigr middle quad qquad enspace enskip thinspace medspace thickspace "
    "negthinspace space nobreakspace hfill hfil vfill null relax ensuremath strut mathstrut "
    "displaystyle textstyle scriptstyle tiny scriptsize footnotesize small normalsize large "
    "Large LARGE huge Huge underline overline bar hat vec tilde dot frac dfrac tfrac sqrt "
    "newline par noindent smallskip medskip bigskip linebreak selectfont ldots cdots dots dotsc "
    "vdots ddots".split()
)
_BLANK = frozenset("$~\u115f\u1160\u2800\u3164\uffa0")  # a tie, letters without ink


def is_visible(text: str) -> bool:
    """Tell whether a letter, a digit or a sign of mathematics can be seen."""
    return any(map(_shows, _TOKEN.finditer(text)))


def _shows(token: re.Match[str]) -> bool:
    """Tell whether one of `_TOKEN` can be seen."""
    if token["command"]:
        return token["command"] not in _FRAMES
    if token["entity"]:
        return any(map(_is_inked, html.unescape(token["entity"])))
    if token["sign"]:
        return token["sign"] in (r"\{", r"\}", r"\$") or _is_inked(token["sign"][-1])
    return False


def _is_inked(character: str) -> bool:
    """Tell whether this is a letter, a digit or a symbol, which dots and marks are not."""
    kind = unicodedata.category(character)
    return (kind[0] in "LN" or kind in ("Sm", "Sc", "So")) and character not in _BLANK
