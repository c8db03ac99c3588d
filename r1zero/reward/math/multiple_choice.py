"""Answers that are letters or words: multiple choice, yes or no, names."""

from __future__ import annotations

import re

from r1zero.reward.math.normalize import unwrap
from r1zero.reward.math.number_words import to_digits
from r1zero.reward.math.words import NOTHING, is_denied, plain_words

_TEXT = re.compile(r"\\text ?|[{}]")
_LETTER = re.compile(r"\(?([A-Z])\)?")
_LEAD = re.compile(
    r"(?:the )?(?:(?:correct )?(?:answer|choice|option) ?(?:is ?)?:? ?)?", re.IGNORECASE
)
_CHINESE_LEAD = re.compile(r"(?:\u7b54\u6848|\u9009\u9879|\u9009)(?:\u662f|\u4e3a)?:? ?")
_CHOICE = re.compile(  # C, (C), C. 12, (C) 12, C Cecile
    r"\(?(?P<letter>[A-Za-z])"
    r"(?:\)|\)? ?[.:,](?P<marked>.*)|\) (?P<apart>.*)| (?P<words>[A-Za-z][a-z].*))?"
)
_OPTION = re.compile(r"(?:\((?P<in>[A-Z])\) *|(?P<before>[A-H])[.)] *)(?P<text>[^ +*/^=_<>()-].*)")
_HEDGE = re.compile(  # a second choice
    r"[\u2227\u2228]|(?<![A-Za-z0-9])[A-Z](?:[).:,]|$)"
    r"|^(?:[ ,;&/()]*(?<![A-Za-z])[A-Ha-h](?![A-Za-z]))+[).]?$"
)
_LONE_CAPITAL = re.compile(r"(?<![A-Za-z])[A-Z](?![A-Za-z])|[0-9=+]")
_WORD = re.compile(r"(?=.*(?:[^\W\d_]{3}|[\u3400-\u9fff]))[^\W\d_](?:[^\W\d_]|[ '.-])*")
_LETTERS = re.compile(r"[A-Z](?: ?[,\u2227]? ?[A-Z])+")
_CONTRARY = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
_CONTRARY |= {"\u662f": "\u5426", "\u5426": "\u662f", "\u5bf9": "\u9519", "\u9519": "\u5bf9"}
_VERDICT = re.compile(
    rf"(?P<verdict>{'|'.join(_CONTRARY)})\u7684?"
    r"(?:$|(?:[,.;:!-]| (?=(?:it|they|he|she|we|there|this|that|because|since)\b))(?P<rest>.*))"
)


def same_text(gold: str, given: str) -> bool | None:
    """Compare a choice or words, both cleaned; None when the right answer is neither, or may be a
    formula."""
    bare = unwrap(gold)
    choice = _TEXT.sub("", gold).strip()
    plain = _TEXT.sub("", given).strip()
    letter = _LETTER.fullmatch(choice)
    if letter:
        return _same_choice(letter[1], plain)
    option = _OPTION.fullmatch(choice)
    if option:
        return _same_option(option["in"] or option["before"], option["text"], plain)
    if (
        _LETTERS.fullmatch(bare)
        and _LETTERS.fullmatch(plain)
        and not (bare.isalpha() and plain.isalpha())
    ):
        left, right = (re.findall("[A-Z]", side) for side in (bare, plain))
        if bare.isalpha():
            return left == right
        return sorted(left) == sorted(right)
    if plain_words(bare) in _CONTRARY:
        return _same_verdict(plain_words(bare), plain.casefold())
    if not _WORD.fullmatch(bare) or len(bare) < 2 or to_digits(bare) != bare:
        return None
    named = _read_option(plain)
    if plain_words(bare) in (plain_words(plain), plain_words(named[1]) if named else ""):
        return True
    # xy, but not east
    is_product = bare == gold and bare.isascii() and bare.isalpha() and len(bare) < 4
    if is_product or plain_words(bare) in NOTHING | {"infinity"}:
        return None
    return False


def _same_choice(letter: str, given: str) -> bool | None:
    """Compare a letter with a letter and the text of its option, if there is one."""
    option = _read_option(given)
    if option is None:
        return None
    return option[0] == letter


def _same_option(letter: str, text: str, given: str) -> bool:
    """Compare a letter and its text with either of them, or with both."""
    option = _read_option(given)
    if option is None or _squeezed(given) == _squeezed(text):
        return _squeezed(given) == _squeezed(text)
    return option[0] == letter and _squeezed(option[1]) in ("", _squeezed(text))


def _read_option(text: str) -> tuple[str, str] | None:
    """Return the letter of a choice, "" for several, and the text behind it; None for no choice."""
    text = _LEAD.sub("", text, count=1)
    choice = _CHOICE.fullmatch(_CHINESE_LEAD.sub("", text, count=1).strip())
    if choice is None:
        return None
    words = choice["words"] or ""
    behind = words or choice["marked"] or choice["apart"] or ""
    if _HEDGE.search(behind) or is_denied(behind) or _LONE_CAPITAL.search(words):
        return "", ""
    if words and choice["letter"].islower():
        return None  # a cat
    return choice["letter"].upper(), behind


def _squeezed(text: str) -> str:
    return re.sub(r"[ $.]", "", text).casefold()


def _same_verdict(gold: str, given: str) -> bool:
    """Compare yes, no, true or false with the same word, and what is said behind it: Yes, it is."""
    if plain_words(given) == gold:
        return True
    match = _VERDICT.fullmatch(given)
    if match is None or match["verdict"] != gold:
        return False
    rest = match["rest"] or ""
    if re.search(rf"\b(?:{_CONTRARY[gold]}|or|maybe|perhaps)\b|\u2228", rest):
        return False
    return gold in ("no", "false") or not is_denied(rest)
