"""Answers that are letters: multiple choice, and words in which the order of letters matters."""

from __future__ import annotations

import re

from r1zero.reward.answers import NOTHING, plain_words
from r1zero.reward.number_words import to_digits
from r1zero.reward.spelling import unwrap

_TEXT = re.compile(r"\\text ?|[{}]")
_LETTER = re.compile(r"\(?([A-Z])\)?")
_LEAD = re.compile(r"(?:the )?(?:(?:correct )?(?:answer|choice|option) ?(?:is ?)?:? ?)?", re.IGNORECASE)
_CHINESE_LEAD = re.compile(r"(?:\u7b54\u6848|\u9009\u9879|\u9009)(?:\u662f|\u4e3a)?:? ?")
_CHOICE = re.compile(r"\(?([A-Za-z])(?:\)?|[).:,](.*))")
_HEDGE = re.compile(  # a second choice
    r"[\u2227\u2228]|(?<![A-Za-z0-9])[A-Z](?:[).:,]|$)"
    r"|^(?:[ ,;&/()]*(?<![A-Za-z])[A-Ha-h](?![A-Za-z]))+[).]?$"
)
_WORD = re.compile(r"(?=.*(?:[^\W\d_]{3}|[\u3400-\u9fff]))[^\W\d_](?:[^\W\d_]|[ '.-])*")
_LETTERS = re.compile(r"[A-Z](?: ?[,\u2227]? ?[A-Z])+")


def same_text(gold: str, given: str) -> bool | None:
    """Compare a choice or words, both cleaned; None when the right answer is neither, or may be a formula."""
    bare = unwrap(gold)
    letter = _LETTER.fullmatch(_TEXT.sub("", gold).strip())
    plain = _TEXT.sub("", given).strip()
    if letter:
        return _same_choice(letter[1], plain)
    if _LETTERS.fullmatch(bare) and _LETTERS.fullmatch(plain) and not (bare.isalpha() and plain.isalpha()):
        left, right = (re.findall("[A-Z]", side) for side in (bare, plain))
        return left == right if bare.isalpha() else sorted(left) == sorted(right)
    if not _WORD.fullmatch(bare) or len(bare) < 2 or to_digits(bare) != bare:
        return None
    if plain_words(bare) == plain_words(plain):
        return True
    is_product = bare == gold and bare.isascii() and bare.isalpha() and len(bare) < 4  # xy, but not east
    return None if is_product or plain_words(bare) in NOTHING | {"infinity"} else False


def _same_choice(letter: str, given: str) -> bool | None:
    choice = _CHOICE.fullmatch(_CHINESE_LEAD.sub("", _LEAD.sub("", given, count=1), count=1).strip())
    if choice is None:
        return None
    return choice[1].upper() == letter and not _HEDGE.search(choice[2] or "")
