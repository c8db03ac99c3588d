"""What is worth knowing about data before a run, a sentence each; nothing here refuses anything.

Looked at are the right answers (do they look like answers?), the held-out problems (does training
see them, too?), and what all questions say (an instruction may contradict the prompt template).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from r1zero.data.splits import is_of_other_split
from r1zero.data.template import Template
from r1zero.reward.math.gold import survey_golds

_PLACES = re.compile(r"(\{question\}|\{system\})")
_SHORTEST = 30  # characters that make an instruction
_FEWEST = 10  # questions that show one
_SHOWN = 60  # characters of it


@dataclass(frozen=True, slots=True)
class DataSet:
    """What is looked at of one data set; `key` is that of the configuration, or a flag."""

    key: str
    path: str
    questions: Sequence[str]
    answers: Sequence[str]


def survey(train: Sequence[DataSet], held_out: Sequence[DataSet], compared: bool) -> list[str]:
    """Return the sentences. Right answers matter if they are `compared` with responses."""
    said = []
    for data in [*train, *held_out]:
        said += _about_answers(data) if compared else []
        said += _about_instructions(data)
    for data in train:
        if is_of_other_split(Path(data.path).name, held_out=False):
            said.append(
                f"warning: {data.key}: {data.path} is trained on, though its name is that "
                "of another split"
            )
    for data in held_out:
        said += _about_leaks(train, data)
    return said


def question_in(template: Template, text: str) -> str:
    """Return the question in a rendered prompt, whatever its system text.

    A text that is not of the template's form is returned whole.
    """
    match = _form(template.text).fullmatch(text)
    if match:
        return match["question"]
    return text


@functools.cache
def _form(text: str) -> re.Pattern[str]:
    """What the prompts of a template look like."""
    pattern = {"{question}": "(?P<question>.*)", "{system}": ".*?"}
    pieces = [pattern.get(piece) or re.escape(piece) for piece in _PLACES.split(text)]
    return re.compile("".join(pieces), re.DOTALL)


def _about_answers(data: DataSet) -> list[str]:
    verdict = survey_golds(data.answers)
    if not verdict.odd:
        return []
    return [
        f"warning: {data.key}: {verdict.odd} of {verdict.total} right answers of {data.path} "
        "do not look like answers, so responses will hardly match them: "
        + ", ".join(verdict.examples)
    ]


def _about_instructions(data: DataSet) -> list[str]:
    """Tell of a long text that all questions begin or end with."""
    if len(set(data.questions)) < _FEWEST:
        return []
    start = _common_start(data.questions).strip()
    end = _common_start([question[::-1] for question in data.questions])[::-1].strip()
    found = []
    if len(start) >= _SHORTEST:
        found.append(f"begin with {start[:_SHOWN]!r}")
    if len(end) >= _SHORTEST:
        found.append(f"end with {end[-_SHOWN:]!r}")
    if not found:
        return []
    return [
        f"{data.key}: all questions of {data.path} {' and '.join(found)}: if that is an "
        "instruction, look whether it contradicts the prompt template, and \\boxed{}, in which "
        "answers are looked for"
    ]


def _common_start(texts: Sequence[str]) -> str:
    """What all texts begin with: as far as the first and the last of them in order agree."""
    first = min(texts)
    last = max(texts)
    length = 0
    while length < len(first) and first[length] == last[length]:
        length += 1
    return first[:length]


def _about_leaks(train: Sequence[DataSet], held_out: DataSet) -> list[str]:
    """Count the held-out questions that are trained on, whatever their white space and case."""
    asked = {_key(question) for question in held_out.questions}
    said = []
    for data in train:
        seen = len(asked.intersection(map(_key, data.questions)))
        if seen:
            said.append(
                f"warning: {held_out.key}: {seen} of the {len(asked)} different questions "
                f"of {held_out.path} are also in the training data, {data.path}: scores on "
                "what was trained on say nothing about new problems"
            )
    return said


def _key(question: str) -> str:
    return "".join(question.casefold().split())
