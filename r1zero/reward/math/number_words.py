"""Numbers in words, English and Chinese, written in digits; and words that multiply: 2 million, 5
tenths."""

from __future__ import annotations

import re
from fractions import Fraction

_SMALL = dict(
    zip(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen".split(),
        range(20),
        strict=True,
    )
)
_TENS = dict(
    zip(
        "twenty thirty forty fifty sixty seventy eighty ninety".split(),
        range(20, 100, 10),
        strict=True,
    )
)
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_PARTS = dict(
    zip(
        "half third quarter fifth sixth seventh eighth ninth tenth".split(),
        range(2, 11),
        strict=True,
    )
)
_PARTS |= {f"{word}s": size for word, size in _PARTS.items()} | {
    "halves": 2,
    "fourth": 4,
    "fourths": 4,
}
_DIGIT = re.compile("[0-9]")
_WORD = re.compile(r"[a-z]+")
NUMBER_WORD = f"(?:{'|'.join([*_SMALL, *_TENS])})"  # a pattern

_DIGITS = "\u96f6\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d"
_ONE_CHARACTER = {character: value for value, character in enumerate(_DIGITS)} | {"\u4e24": 2}
_ROW = {"\u5341": 10, "\u767e": 100, "\u5343": 1000}
_TEN_THOUSAND = "\u4e07"
_HUNDRED_MILLION = "\u4ebf"
_ONE = "[" + "".join(_ONE_CHARACTER) + "]"
_NUMERAL = "[" + "".join(_ONE_CHARACTER) + "".join(_ROW) + _TEN_THOUSAND + "]"
_CHINESE = re.compile(  # parts of, whole, or with a decimal point, which a time of day has none of
    rf"({_NUMERAL}+|[0-9]+)\u5206\u4e4b({_NUMERAL}+|[0-9.]+)"
    rf"|({_NUMERAL}+(?:{_HUNDRED_MILLION}{_NUMERAL}*)?)(?:\u70b9({_ONE}+)(?![\u5206\u5341]))?"
)

# Quarters are coins, and a thousand before grams or metres is part of their name.
_COUNTS = {name: Fraction(size) for name, size in _SCALES.items()}
_COUNTS |= {f"{name}th": 1 / _COUNTS[name] for name in ("hundred", "thousand")}
_COUNTS |= {"trillion": Fraction(10**12), "dozen": Fraction(12), "halve": Fraction(1, 2)}
_COUNTS |= {
    name: Fraction(1, size)
    for name, size in _PARTS.items()
    if name[-1] != "s" and name != "quarter"
}
MAX_COUNTS = 3  # hundred thousand million
_COUNT = re.compile(
    rf"(?P<english>{'|'.join(sorted(_COUNTS, reverse=True))})s?(?![a-z])(?: of)? ?"
    r"|(?P<chinese>[\u5341\u767e\u5343]?[\u4e07\u4ebf]|\u767e(?!\u5206)|\u5343(?![\u514b\u7c73\u74e6\u5361]))"
)


def take_count(text: str) -> tuple[Fraction, str]:
    """Cut up to three words that multiply off a text in lower case; return their product and the
    rest.

    "hundred thousand apples" is 100,000 and "apples"; the product is 1 where there are none.
    """
    count = Fraction(1)
    for _ in range(MAX_COUNTS):
        match = _COUNT.match(text)
        if match is None:
            break
        count *= (
            _COUNTS[match["english"]] if match["english"] else int(_chinese_value(match["chinese"]))
        )
        text = text[match.end() :]
    return count, text


def to_digits(text: str) -> str:
    """Write a number in words at the start of a text in digits: "twenty-five apples" is "25
    apples"."""
    if not text[:1].isalpha():
        return text
    if text[0].isascii():
        return _english(text)
    if _DIGIT.search(text):
        return text
    return _CHINESE.sub(_chinese, text, count=1)


def _fits(value: int, group: int) -> bool:
    """Tell whether a word below 100 may follow what the group holds: twenty one, but not one
    one."""
    if value >= 10:
        return group % 100 == 0
    return group % 10 == 0 and (group % 100 == 0 or group % 100 >= 20)


def _english(text: str) -> str:
    total = 0
    group = 0
    end = 0
    last = ""
    for match in _WORD.finditer(text.lower()):
        word = match[0]
        gap = text[end : match.start()].strip(" -")
        if gap:
            break
        value = _SMALL.get(word, _TENS.get(word))
        if value is not None and _fits(value, group) and last != "zero":
            group += value
        elif word == "hundred" and 0 < group < 100:
            group *= 100
        elif word in _SCALES and group:
            total = total + group * _SCALES[word]
            group = 0
        elif word in _PARTS and (last or word == "half"):
            return f"{total + group if last else 1}/{_PARTS[word]}{text[match.end() :]}"
        else:
            break
        end = match.end()
        last = word
    if last:
        return f"{total + group}{text[end:]}"
    return text


def _chinese(match: re.Match[str]) -> str:
    if match.start() > 0:
        return match[0]
    if match[3]:
        behind = "".join(str(_ONE_CHARACTER[character]) for character in match[4] or "")
        if behind:
            return f"{_chinese_value(match[3])}.{behind}"
        return _chinese_value(match[3])
    return f"{_chinese_value(match[2])}/{_chinese_value(match[1])}"


def _chinese_value(text: str) -> str:
    """Read two hundred and five written in Chinese: digits before the names of their rows."""
    if text[0].isascii():
        return text
    high, large, low = text.partition(_HUNDRED_MILLION)
    if large:
        return str(
            int(_chinese_value(high or _DIGITS[1])) * 10**8 + int(_chinese_value(low or _DIGITS[0]))
        )
    total = 0
    group = 0
    digit = 0
    for character in text:
        if character in _ONE_CHARACTER:
            digit = digit * 10 + _ONE_CHARACTER[character]
        elif character in _ROW:
            group = group + (digit or 1) * _ROW[character]
            digit = 0
        else:
            total = (total + group + digit or 1) * 10_000
            group = 0
            digit = 0
    return str(total + group + digit)
