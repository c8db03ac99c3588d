"""From values of any kind to the typed sections, with a sentence for each that does not fit.

pydantic converts and checks by the annotations of the schema and returns all mistakes at once. Here
they become our sentences: the key as the user wrote it, its value, and a way out.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from r1zero.config.keys import BY_NAME, ONE, UNKNOWN_KEY, WRONG_VALUE
from r1zero.config.parse import SourcedValue
from r1zero.errors import Diagnostics, nearest

Location = Sequence[str | int]  # of a mistake: key, key below it, index in a list


def field_names(kind: Any) -> set[str]:
    return {entry.name for entry in dataclasses.fields(kind)}


@functools.cache
def key_types(kind: Any) -> dict[str, Any]:
    """The annotated type of each key of a section."""
    return typing.get_type_hints(kind, include_extras=True)


@functools.cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """What converts values to a type. An error of pydantic for a type that it cannot check."""
    return TypeAdapter(kind)


def build(kind: Any, given: Mapping[str, SourcedValue], section: str, notes: Diagnostics) -> Any:
    """Make the section `kind` of the values given; null means the default.

    Every mistake is noted. When there is one, the object has only its sound keys: to read another
    raises AttributeError.
    """
    written = {name: item for name, item in given.items() if item.value is not None}
    values = {name: item.value for name, item in written.items()}
    try:
        return adapter(kind).validate_python(values)
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
    for mistake in mistakes:
        name, *inner = mistake["loc"]
        where = written[str(name)].where if name in written else f"{section}.{name}"
        notes.refuse(_sentence(where + _path(inner), kind, mistake))
    return _sound_part(kind, values, {str(mistake["loc"][0]) for mistake in mistakes})


def value_of(kind: Any, value: Any, where: str, notes: Diagnostics) -> Any:
    """Convert a single value; None, with the mistake noted, when it does not fit."""
    try:
        return adapter(kind).validate_python(value)
    except ValidationError as error:
        for mistake in error.errors(include_url=False):
            notes.refuse(_sentence(where + _path(mistake["loc"]), kind, mistake))
        return None


def _sound_part(kind: Any, values: Mapping[str, Any], wrong: set[str]) -> Any:
    """The section without its wrong keys, so that rules among the others can still be told."""
    part = object.__new__(kind)
    for entry in dataclasses.fields(kind):
        if entry.name in wrong:
            continue
        if entry.name in values:
            value = adapter(key_types(kind)[entry.name]).validate_python(values[entry.name])
        elif entry.default_factory is not dataclasses.MISSING:
            value = entry.default_factory()
        else:
            value = entry.default
        object.__setattr__(part, entry.name, value)
    return part


# -- sentences ------------------------------------------------------------------------------------


def _path(location: Location) -> str:
    """`.key` and `[index]` of a place below a key."""
    steps = _steps(location)
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)


def _steps(location: Location) -> list[str | int]:
    """The place without what pydantic adds: "[key]" where a name is wrong, and which form a value
    has."""
    return [step for step in location if step not in ("[key]", ONE, BY_NAME)]


def _sentence(key: str, kind: Any, mistake: ErrorDetails) -> str:
    cause = mistake["type"]
    if cause == WRONG_VALUE:
        return f"{key}: {mistake['msg']}"
    if cause == UNKNOWN_KEY:
        return f"{key} is unknown{mistake['msg']}"
    if cause == "missing":
        return f"{key} is missing: it has no default"
    if cause == "unexpected_keyword_argument":
        *sections, name = map(str, _steps(mistake["loc"]))
        return f"{key} is unknown{nearest(name, field_names(_section_at(kind, sections)))}"
    return f"{key}: {mistake['input']!r:.60}: {mistake['msg']}"


def _section_at(kind: Any, path: Sequence[str]) -> Any:
    """The dataclass of a section below another, or below a name that the user chose."""
    for name in path:
        forms = [form for form in typing.get_args(kind) if typing.get_origin(form) is dict]
        if forms:  # one value, or several by name
            [kind] = forms
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        else:
            kind = typing.get_type_hints(kind)[name]
    return kind
