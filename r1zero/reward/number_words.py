"""Numbers in words, English and Chinese, written in digits."""

from __future__ import annotations

import re

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
)
_SMALL = {word: value for value, word in enumerate([*_ONES.split(), "seventeen", "eighteen", "nineteen"])}
_TENS = dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10)))
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_PARTS = dict(zip("half third quarter fifth sixth seventh eighth ninth tenth".split(), range(2, 11)))
_PARTS |= {f"{word}s": size for word, size in _PARTS.items()} | {"halves": 2, "fourth": 4, "fourths": 4}
_DIGIT = re.compile("[0-9]")
_WORD = re.compile(r"[a-z]+")

_DIGITS = "\u96f6\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d"
_ONE_CHARACTER = {character: value for value, character in enumerate(_DIGITS)} | {"\u4e24": 2}
_ROW = {"\u5341": 10, "\u767e": 100, "\u5343": 1000}
_NUMERAL = "[" + "".join(_ONE_CHARACTER) + "".join(_ROW) + "\u4e07]"
_CHINESE = re.compile(
    f"({_NUMERAL}+|[0-9]+)\u5206\u4e4b({_NUMERAL}+|[0-9.]+)|({_NUMERAL}+)"
)  # parts of, or whole


def to_digits(text: str) -> str:
    """Write a number in words at the start of a text in digits: "twenty-five apples" is "25 apples"."""
    if not text[:1].isalpha():
        return text
    if text[0].isascii():
        return _english(text)
    return text if _DIGIT.search(text) else _CHINESE.sub(_chinese, text, count=1)


def _fits(value: int, group: int) -> bool:
    """Tell whether a word below 100 may follow what the group holds: twenty one, but not one one."""
    if value >= 10:
        return group % 100 == 0
    return group % 10 == 0 and (group % 100 == 0 or group % 100 >= 20)


def _english(text: str) -> str:
    total, group, end, last = 0, 0, 0, ""
    for match in _WORD.finditer(text.lower()):
        word, gap = match[0], text[end : match.start()].strip(" -")
        if gap:
            break
        value = _SMALL.get(word, _TENS.get(word))
        if value is not None and _fits(value, group) and last != "zero":
            group += value
        elif word == "hundred" and 0 < group < 100:
            group *= 100
        elif word in _SCALES and group:
            total, group = total + group * _SCALES[word], 0
        elif word in _PARTS and (last or word == "half"):
            return f"{total + group if last else 1}/{_PARTS[word]}{text[match.end() :]}"
        else:
            break
        end, last = match.end(), word
    return f"{total + group}{text[end:]}" if last else text


def _chinese(match: re.Match[str]) -> str:
    if match.start() > 0:
        return match[0]
    if match[3]:
        return str(_chinese_value(match[3]))
    return f"{_chinese_value(match[2])}/{_chinese_value(match[1])}"


def _chinese_value(text: str) -> str:
    """Read two hundred and five written in Chinese: digits before the names of their rows."""
    if text[0].isascii():
        return text
    total, group, digit = 0, 0, 0
    for character in text:
        if character in _ONE_CHARACTER:
            digit = digit * 10 + _ONE_CHARACTER[character]
        elif character in _ROW:
            group, digit = group + (digit or 1) * _ROW[character], 0
        else:
            total, group, digit = (total + group + digit) * 10_000, 0, 0
    return str(total + group + digit)
