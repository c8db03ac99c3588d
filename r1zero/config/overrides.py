"""Overrides: `section.key=value` of a command line, read into sections as those of a file.

`algorithm=dapo`, a text for the whole section, chooses a preset (presets.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from r1zero.config.parse import parse
from r1zero.config.sections import SECTIONS, place_hint
from r1zero.errors import Diagnostics, nearest


class Whole(dict):
    """A mapping that an override gives as a whole: it takes the place of what is below it. One that
    leads to a key with dots adds that key."""


@dataclass(slots=True)
class Overrides:
    """What a command line says."""

    sections: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {section: {} for section in SECTIONS}
    )
    top: dict[str, Any] = field(default_factory=dict)  # name and output_dir
    preset: str | None = None


def read_overrides(texts: Sequence[str], of_file: dict[str, Any], notes: Diagnostics) -> Overrides:
    """Read overrides of the sections of a file; each wrong one is a sentence in `notes`."""
    found = Overrides()
    for text in texts:
        _read(found, text, of_file, notes)
    return found


def _read(found: Overrides, text: str, of_file: dict[str, Any], notes: Diagnostics) -> None:
    """Read one; the value is YAML."""
    name, equals, written = text.partition("=")
    path = [part.replace("-", "_") for part in name.strip().split(".")]
    if path[0] == "actor_rollout_ref":
        path = path[1:]
    if not equals or not path:
        notes.refuse(f"the override {text!r} must have the form section.key=value")
        return
    value = _value(written)
    if path in (["name"], ["output_dir"]):
        found.top[path[0]] = value
    elif path == ["algorithm"] and isinstance(value, str):
        found.preset = value
    elif path[0] not in SECTIONS:
        hint = place_hint(path[-1]) or nearest(path[0], SECTIONS)
        notes.refuse(
            f"the override {text!r} must begin with one of the sections {', '.join(SECTIONS)}{hint}"
        )
    elif len(path) == 1:
        notes.refuse(f"the override {text!r} must name a key of the section: {path[0]}.key=value")
    elif _lies_in_a_value(of_file, path) or _lies_in_a_value(found.sections, path):
        notes.refuse(f"the override {text!r}: {path[-2]} has no keys of its own")
    else:
        _set(found.sections, path, value)


def _value(written: str) -> Any:
    try:
        return parse(written)
    except yaml.YAMLError:
        return written


def _lies_in_a_value(sections: dict[str, Any], path: Sequence[str]) -> bool:
    """Whether a path leads through something that is no section."""
    place: Any = sections
    for part in path[:-1]:
        place = place.get(part)
        if not isinstance(place, dict):
            return place is not None
    return False


def _set(sections: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Put a value into a section, or into the sections below it, which are made where missing."""
    *parents, key = path
    place = sections
    for part in parents:
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
    place[key] = Whole(value) if isinstance(value, dict) else value
