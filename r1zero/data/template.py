"""Chat templates: how a question becomes the prompt that the model reads.

`configs/templates.json` maps each name to {"text": [pieces, joined as they stand], "system":
default, "stop": [texts]}; in the text {question} and {system} are filled in, all other braces are
literal. A response ends at any of the texts under "stop", each one token; where it is left out, at
the mark that closes the question's turn, such as <|im_end|>, if there is one. A reward model reads "close"
behind a response; where it is left out, the first text at which a response ends. Add an entry to add a
template.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from r1zero.config.parse import read_json
from r1zero.errors import BadInput

TEMPLATES = Path(__file__).resolve().parents[2] / "configs" / "templates.json"
_PLACES = re.compile(r"\{(question|system)\}")
# What chat formats mark turns with. <think> and the like are text.
_MARKS = re.compile(r"<[|｜][^<>|｜\s]+[|｜]>|</?s>|<(?:start|end)_of_turn>")


class Template:
    """A named template of a templates file."""

    def __init__(self, name: str, path: str | Path = TEMPLATES) -> None:
        """Look `name` up. BadInput when the file or the entry is missing or malformed."""
        entry = _read(Path(path), name)
        self.name = name
        self.text: str = "".join(entry["text"])
        self.default_system: str | None = entry.get("system")
        places = _PLACES.findall(self.text)
        if places.count("question") != 1:
            raise BadInput(
                f"{path}: the text of template {name!r} must hold {{question}} exactly once"
            )
        self.takes_system = "system" in places
        if self.takes_system != (self.default_system is not None):
            raise BadInput(
                f"{path}: template {name!r} needs {{system}} in its text and a default under "
                '"system", or neither'
            )
        self.marks = list(dict.fromkeys(_MARKS.findall(self.text)))
        self.stop: list[str] = entry.get("stop", _closing_mark(self.text))
        self.close: str = entry.get("close", "".join(self.stop[:1]))

    def render(self, question: str, system: str | None = None) -> str:
        """Return the prompt for `question`; an empty `system` means the template's default.

        BadInput when a system text is given that the template has no place for.
        """
        if system and not self.takes_system:
            raise BadInput(
                f"template {self.name!r} has no {{system}}, so the data's system text would be "
                'lost; choose another prompt_type or set map_keys.system to ""'
            )
        filling = {"question": question, "system": system or self.default_system or ""}
        return _PLACES.sub(lambda place: filling[place[1]], self.text)


def _read(path: Path, name: str) -> dict:
    """Return the entry `name` of the templates file at `path`."""
    entries = read_json(path)
    if not isinstance(entries, dict):
        raise BadInput(f"{path} must hold a JSON object that maps names to templates")
    if name not in entries:
        nearest = difflib.get_close_matches(name, entries, cutoff=0.4) or list(entries)
        raise BadInput(
            f"prompt template {name!r} is not in {path}; the nearest are {', '.join(nearest)}"
        )
    entry = entries[name]
    if (
        not isinstance(entry, dict)
        or not set(entry) <= {"text", "system", "stop", "close"}
        or not isinstance(entry.get("system", ""), str)
        or not isinstance(entry.get("close", ""), str)
        or not _is_texts(entry.get("text"))
        or not _is_texts(entry.get("stop", []))
    ):
        raise BadInput(
            f'{path}: template {name!r} must have "text", a list of strings, and may have '
            '"system" and "close", strings, and "stop", a list of strings'
        )
    return entry


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(piece, str) for piece in value)


def _closing_mark(text: str) -> list[str]:
    """The first of several marks behind the question; a single one opens the answer."""
    marks = _MARKS.findall(text.partition("{question}")[2])
    if len(marks) > 1:
        return marks[:1]
    return []
