"""Answers in words: one form of each, and words that deny what stands beside them."""

from __future__ import annotations

import re

NOTHING = frozenset(
    ("no solution", "no solutions", "no real solution", "no real solutions", "none", "empty set")
)
_DENIAL = re.compile(
    r"\b(?:not|neg|lnot|neither|never|none|cannot|without|except|excluding|unlike|other than"
    r"|opposite|instead|rather|maybe|perhaps|possibly|wrong|incorrect|untrue|false"
    r"|(?-i:[Nn]o(?!\.)|[Nn]on(?!-)|[Nn]or|[Bb]ut))\b"  # NO and NOR may be names of lines
    r"|n't\b|\u00ac|[\u4e0d\u975e\u6ca1\u65e0\u9519](?!\u540c)",  # Chinese; "different" is none
    re.IGNORECASE,
)


def plain_words(text: str) -> str:
    """Return words without case, articles, and marks between them; synonyms in one form."""
    words = re.sub(r"(?<=\w)[ .-]+", " ", text.casefold()).strip()
    words = re.sub(r"^(?:the|an|a) ", "", words)
    if words == "dne":
        return "does not exist"
    return words


def is_denied(text: str) -> bool:
    """Tell whether a word takes back or limits what is said: not 5, 5 is wrong, maybe 5."""
    return _DENIAL.search(text) is not None
