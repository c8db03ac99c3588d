r"""What is said behind an answer about its letters: `n = 3k \text{ for } k \in \mathbb{N}`."""

from __future__ import annotations

import re

from r1zero.reward.math.normalize import CLOSING, GE, IN, LE, NE, OPENING

_SIGNAL = r"(?:for|where|when|with|such that)\b"
_CASES = re.compile(r"\b(?:for|when|if|otherwise|else)\b")
_CONDITION = re.compile(
    rf"(?P<main>.+?)(?: ?[,;]? ?\\text ?\{{[ ,;(]*{_SIGNAL}| ?[,;]? {_SIGNAL}|[,;] ?{_SIGNAL}|[,;]? ?\\forall"
    rf"|[,; (](?= ?[A-Za-z](?: ?, ?[A-Za-z])* ?{IN})|[,;(](?= ?[A-Za-z] ?[<>{LE}{GE}{NE}]))"
    r"(?P<rest>.+)"
)
_OPEN = re.compile(rf"[<>{LE}{GE}{NE}]|[-+*/=^_] *$")
_MARKS = re.compile(r"\\text|\\mathbb|[{}()., ]|\b(?:all|any|every|some|an?|is|are)\b")
_DOMAIN = re.compile(rf"[A-Za-z]+{IN}[NZQRC\u211d][+*^_0-9-]*|.*(?:integers?|numbers?)[A-Za-z]*")
_NO_LETTERS = re.compile(r"\\[A-Za-z]+|[A-Za-z]{3,}")


def split_condition(text: str) -> tuple[str, str]:
    """Cut a cleaned text into the answer and a condition on letters of its value, "" for none."""
    match = _CONDITION.fullmatch(text)
    if match is None or "\\begin" in text:
        return text, ""
    main = match["main"]
    rest = match["rest"]
    if not _is_closed(main) or _OPEN.search(main) or _CASES.search(rest):
        return text, ""
    if not _letters(main.rpartition("=")[2]) & _letters(rest):
        return text, ""
    return main.rstrip(" ,;"), _MARKS.sub("", rest)


def is_domain(condition: str) -> bool:
    """Tell whether a condition only says what numbers a letter stands for: integers, reals."""
    return _DOMAIN.fullmatch(condition) is not None


def _is_closed(text: str) -> bool:
    return sum(map(text.count, OPENING)) == sum(map(text.count, CLOSING))


def _letters(text: str) -> set[str]:
    return set(re.findall("[A-Za-z]", _NO_LETTERS.sub(" ", text)))
