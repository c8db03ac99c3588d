"""From the values of a row to a problem: texts, numbers, lists of messages, structs behind dots."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from r1zero.data.bad_rows import BadRow, NoAnswer, Tally
from r1zero.data.layout import ColumnLayout
from r1zero.data.messages import NoQuestion, as_messages, question_and_system
from r1zero.data.rows import UnreadableRow, Values
from r1zero.reward.math.gold import NO_ANSWERS, read_gold, the_one_of
from r1zero.scores import BY_MODEL, BY_RULES

# What a column of categories may say: 1 the reward functions, 0 the reward model.
CATEGORIES = {
    "1": BY_RULES,
    "1.0": BY_RULES,
    "rules": BY_RULES,
    "0": BY_MODEL,
    "0.0": BY_MODEL,
    "model": BY_MODEL,
}
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of the data: what is asked, the right answer, and a system text.

    An empty system text stands for the template's. `row` has the columns that the layout keeps; None
    when it keeps none. `category` is what scores responses (scores.py); None where no
    column says it.
    """

    question: str
    answer: str
    system: str
    row: dict[str, Any] | None = None
    category: int | None = None


def read_row(
    values: Values, columns: dict[str, str], layout: ColumnLayout, tally: Tally
) -> Problem:
    """Make a problem of a row, by the `columns` of its parts. BadRow and NoAnswer when it is none.

    The question is prompt, newline, query, without the empty ones.
    """
    if isinstance(values, UnreadableRow):
        raise BadRow("unreadable", values.why, "correct the file")
    answer = _answer(_value(values, columns["response"]), columns["response"])
    if answer.casefold() in NO_ANSWERS:
        raise NoAnswer(answer)
    question, chat_system = _question(_value(values, columns["prompt"]), columns["prompt"])
    query = _text(_value(values, columns["query"]), columns["query"])
    system = _text(_value(values, columns["system"]), columns["system"])
    if chat_system:
        kept = layout.keep_chat_system and not columns["system"]
        if kept:
            system = chat_system
        tally.chat_system(kept)
    row = {column: _value(values, column) for column in layout.kept}
    text = "\n".join(filter(None, (question, query)))
    category = _category(_value(values, columns["category"]), columns["category"])
    return Problem(text, answer, system, row or None, category)


def _value(row: dict[str, Any], column: str) -> Any:
    """Return what stands in a column, or behind dots in it; None where there is nothing."""
    if not column or column in row:
        return row.get(column)
    value: Any = row
    for name in column.split("."):
        if isinstance(value, str):
            value = _parsed(value)
        if isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value


def _parsed(text: str) -> Any:
    """Return the struct that a text is in JSON; None for other texts."""
    try:
        if text.lstrip()[:1] in ("{", "["):
            return json.loads(text)
        return None
    except (ValueError, RecursionError):
        return None


def _category(value: Any, column: str) -> int | None:
    """Return what scores the responses to a problem, 1 the rules or 0 the reward model; None where
    nothing stands."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    text = str(value).strip().casefold()
    found = CATEGORIES.get(text)
    if found is None and text:
        raise BadRow(
            f"{column} category",
            f"column {column!r} is {value!r:.80}, which is no category",
            "write 1 (rules) or 0 (model), or nothing for both",
        )
    return found


def _question(value: Any, column: str) -> tuple[str, str]:
    """Return the text of a prompt, and the system's text where it is a list of messages."""
    messages = as_messages(value)
    if messages is None:
        return _filled(_text(value, column, required=True), column), ""
    try:
        question, system = question_and_system(messages)
    except NoQuestion as error:
        found = f"column {column!r} is a list of messages, but {error}"
        raise BadRow(f"{column} dialogue", found) from None
    return _filled(_checked(question, column), column), _checked(system, column)


def _answer(value: Any, column: str) -> str:
    """Return the right answer: a text, a number, or a list that holds one of them."""
    if isinstance(value, list):
        value = _only_answer([_answer(item, column) for item in value], column)
    is_number = isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)
    if is_number and math.isinf(value):
        raise BadRow(f"{column} infinite", f"column {column!r} is {value}, which is no answer")
    if is_number and not math.isnan(value):
        value = str(value)
    return _filled(read_gold(_text(value, column, required=True)), column)


def _only_answer(texts: list[str], column: str) -> str:
    only = the_one_of(texts)
    if only is None and texts:
        raise BadRow(
            f"{column} several",
            f"column {column!r} holds several answers, {texts!r:.80}",
            f"name one of them, such as {column}.0, or write one text, with commas if all "
            "are asked for",
        )
    return only or ""


def _text(value: Any, column: str, required: bool = False) -> str:
    """Return a value that must be a text, "" where there is none and none is required."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        if required:
            raise BadRow(f"{column} null", f"column {column!r} is missing or null")
        return ""
    if isinstance(value, dict):
        fields = ", ".join(f"{column}.{name}" for name in value)
        raise BadRow(
            f"{column} struct",
            f"column {column!r} is {value!r:.80}, not a text",
            f"name what in it is meant: {fields:.200}",
        )
    if not isinstance(value, str):
        raise BadRow(f"{column} kind", f"column {column!r} is {value!r:.80}, not a text")
    return _checked(value, column)


def _checked(text: str, column: str) -> str:
    """Return a text that consists of characters."""
    if text.isprintable():
        half = None
    else:
        half = _HALF.search(text)
    if half:
        raise BadRow(
            f"{column} half",
            f"column {column!r} has half of a surrogate pair, {half[0]!a}, which is no character",
        )
    return text


def _filled(text: str, column: str) -> str:
    if not text.strip():
        raise BadRow(f"{column} empty", f"column {column!r} is empty")
    return text
