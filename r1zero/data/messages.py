"""A question written as a list of chat messages, as verl's data sets have it."""

from __future__ import annotations

import json
from typing import Any

_ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}  # other names of the same


class NoQuestion(Exception):
    """Says why a list of messages is no single question."""


def as_messages(value: Any) -> list[dict[str, Any]] | None:
    """Return a list of messages, also one written as JSON text; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(each, dict) for each in value):
        return value
    return None


def question_and_system(messages: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the user's text and the system's, "" for none. NoQuestion for another dialogue."""
    texts: dict[str, list[str]] = {"user": [], "system": []}
    for message in messages:
        said_by = message.get("role", message.get("from"))
        role = _ROLES.get(said_by, said_by) if isinstance(said_by, str) else said_by
        if role not in texts:
            raise NoQuestion(
                f"it has one of the role {role!r}; read is one of the user, and what "
                "the system says"
            )
        texts[role].append(_text(message.get("content", message.get("value"))))
    if len(texts["user"]) != 1:
        raise NoQuestion(f"{len(texts['user'])} of them are of the user; read is one")
    return texts["user"][0], "\n".join(texts["system"])


def _text(content: Any) -> str:
    """Return the text of a message, which may stand in parts."""
    if isinstance(content, list):
        parts = content
    else:
        parts = [content]
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise NoQuestion(f"one of them holds {content!r:.60}, not a text")
        texts.append(text)
    return "".join(texts)
