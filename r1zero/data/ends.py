"""Stop tokens (EOS): what ends a response.

Four sources name it: the model's files, its tokenizer, the prompt template (the mark that closes a
turn: a base model knows its own end of text only, and after a chat prompt it closes the turn
instead) and the configuration. All of them count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1zero.config.parse import read_json
from r1zero.data.template import Template
from r1zero.data.vocabulary import Vocabulary
from r1zero.errors import BadInput, shown

FILES = ("config.json", "generation_config.json")  # of a model folder
SHOWN_MARKS = 6


@dataclass(frozen=True, slots=True)
class Ends:
    """The ids that end a response, each with who names it."""

    sources: dict[int, list[str]]  # by ascending id
    texts: dict[int, str]

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(self.sources)

    def __str__(self) -> str:
        """Say it in one line."""
        return " or ".join(
            f"{self.texts[number]!r} ({number}; {', '.join(sources)})"
            for number, sources in self.sources.items()
        )


def find_ends(
    folder: Path, vocabulary: Vocabulary, templates: Iterable[Template], stop: Sequence[str]
) -> Ends:
    """Collect what ends a response of the model in `folder`, whatever the template of its prompt.
    BadInput when nothing does, or by a bad source.

    Ids that stand for no token are never drawn, so they end nothing and are left out.
    """
    named = [(number, name) for name in FILES for number in file_ends(folder / name)]
    if vocabulary.end_of_text is not None:
        named.append((vocabulary.end_of_text, "tokenizer"))
    for template in templates:
        source = f"template {template.name}"
        named += [(number, source) for number in template_ends(template, vocabulary)]
    named += [(number, "stop") for number in stop_ends(stop, vocabulary)]
    found: dict[int, list[str]] = {}
    for number, source in sorted(
        (each for each in named if each[0] in vocabulary.ids), key=lambda each: each[0]
    ):
        found.setdefault(number, []).append(source)
    if not found:
        raise BadInput(
            f"{folder}: no token ends a response, neither by eos_token_id in config.json or "
            "generation_config.json, nor by the tokenizer's eos_token or the template; name one "
            "in actor_rollout.stop (--stop of tools/evaluate.py)"
        )
    return Ends(found, {number: vocabulary.text(number) for number in found})


def file_ends(path: Path) -> list[int]:
    """Return the ids under eos_token_id in a JSON file of a model folder; none when there is no
    file.

    BadInput when it is not of this form.
    """
    if not path.is_file():
        return []
    content = read_json(path)
    if not isinstance(content, dict):
        raise BadInput(f"{path} must hold a JSON object")
    given = content.get("eos_token_id")
    if isinstance(given, list):
        ids = given
    elif given is None:
        ids = []
    else:
        ids = [given]
    if any(isinstance(number, bool) or not isinstance(number, int) for number in ids):
        raise BadInput(f"{path}: eos_token_id: {shown(given)} must be an id or a list of ids")
    return ids


def template_ends(template: Template, vocabulary: Vocabulary) -> list[int]:
    """Return the ids of what closes a turn of the template, as far as the tokenizer has such
    tokens."""
    ids = [vocabulary.single(text) for text in template.stop]
    return [number for number in ids if number is not None]


def refuse_split_ends(template: Template, vocabulary: Vocabulary) -> None:
    """BadInput when prompts of this template close turns with what the tokenizer reads as ordinary
    text."""
    for text in template.stop:
        if vocabulary.single(text) is None:
            own = ", ".join(vocabulary.special[:SHOWN_MARKS]) or "it has none"
            raise BadInput(
                f"template {template.name!r} closes a turn with {text}, which is no token of this "
                f"tokenizer but {len(vocabulary.split(text))} of ordinary text, so no response "
                "would end there; choose a template without marks, such as r1_zero_paper, or "
                f'write one with this tokenizer\'s own ({own}); "stop": [] in the template if it '
                "is meant so"
            )


def stop_ends(stop: Sequence[str], vocabulary: Vocabulary) -> list[int]:
    """Return the ids of texts that must be one token each, or ids written as digits. BadInput for
    others."""
    ids = []
    for text in stop:
        number = int(text) if text.isdecimal() else vocabulary.single(text)
        if number is None:
            raise BadInput(
                f"{text!r} is not one token of this tokenizer but "
                f"{shown(vocabulary.split(text))}; a response can only end at a whole "
                "token"
            )
        if number not in vocabulary.ids:
            raise BadInput(
                f"{text} is no id of this tokenizer, whose ids go up to {vocabulary.size - 1}"
            )
        ids.append(number)
    return ids


def split_marks(template: Template, vocabulary: Vocabulary) -> list[str]:
    """Return the template's marks that the tokenizer reads as ordinary text."""
    return [mark for mark in template.marks if vocabulary.single(mark) is None]
