"""From a YAML file to the typed fields of a dataclass, with a sentence for what does not fit."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from r1zero.errors import BadInput, Diagnostics, nearest

NO_VALUE = ("None", "none", "nil", "undefined")  # what other languages call null
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
# of whole numbers: no size, count or seed needs more, and libraries keep some in 32 bits
LARGEST = 2**32 - 1
UNWRITABLE = re.compile("[\0\r\n\ud800-\udfff]")  # what paths, terminals or sentences cannot hold


_BLANKS = "\u00a0\u2002\u2003\u2007\u202f\u3000"
_LOOKALIKE = re.compile(
    rf"[ -]*(?:(?P<blank>[{_BLANKS}])|[\w.-]+(?:\s*(?P<colon>[\uff1a\ufe55\ua789])|:[ ]*(?P<behind>[{_BLANKS}])))"
)


class SourcedValue(NamedTuple):
    """A value as the user wrote it, and where."""

    value: Any
    where: str


class Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice, in either spelling, with two values is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: dict[str, Any] = {}
        for key_node, value_node in node.value:
            value = self.construct_object(value_node, deep=True)
            key = str(key_node.value).replace("-", "_")
            if key != "<<" and seen.setdefault(key, value) != value:
                problem = f"{key} is given twice, as {seen[key]!r} and {value!r}; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        return super().construct_mapping(node, deep=True)


def _resolvers() -> dict[str, list]:
    """Read 12:00:00, dates and 017 as YAML 1.2 does, as texts; in 1.1 they are seconds, objects,
    octal."""
    kept: dict[str, list] = {}
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
        for tag, pattern in resolvers:
            if tag.endswith(":int"):
                pattern = re.compile(r"^[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$")
            if not tag.endswith(":timestamp"):
                kept.setdefault(first, []).append((tag, pattern))
    return kept


Loader.yaml_implicit_resolvers = _resolvers()


def parse(text: str) -> Any:
    """Read YAML. yaml.YAMLError for all that is none, also where PyYAML raises what its
    constructors meet."""
    try:
        return yaml.load(text, Loader)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        # a tag such as !!int before a text
        raise yaml.YAMLError(f"a value does not fit its tag: {error}") from None
    except RecursionError:
        raise yaml.YAMLError("brackets are nested too deep") from None


def read_yaml(path: Path) -> dict:
    """Read a file that holds a YAML mapping. BadInput with file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        refuse_lookalikes(path, text)
        content = parse(text)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        if error.problem_mark:
            line = f"{path}, line {error.problem_mark.line + 1}"
        else:
            line = str(path)
        raise BadInput(f"{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise BadInput(
            f"{path} must hold sections such as `training:`, but holds {type(content).__name__}"
        )
    return content


def refuse_lookalikes(path: Path, text: str) -> None:
    """BadInput for characters that an input method or a web page puts where YAML has its own,
    behind a key or before it.

    YAML takes `lr：1e-6` with a full-width colon for a text, and complains about a line further
    down.
    """
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LOOKALIKE.match(line)
        if match is not None:
            found = match["blank"] or match["colon"] or match["behind"]
            if match["colon"]:
                meant = "a colon"
            else:
                meant = "a blank"
            raise BadInput(
                f"{path}, line {number}: the character {found!r} (U+{ord(found):04X}) looks like "
                f"{meant} and is none to YAML; type {meant} instead"
            )


def read_json(path: Path) -> Any:
    """Read a JSON file. BadInput naming it."""
    try:
        if not path.is_file():  # a device may have no end
            raise FileNotFoundError("there is no such file")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as a JSON file: {error}") from None


def field_names(kind: type) -> set[str]:
    return {entry.name for entry in dataclasses.fields(kind)}


def spelled(mapping: dict) -> dict[str, Any]:
    """Spell all keys with underscores, also those of mappings inside."""
    return {
        str(key).replace("-", "_"): spelled(value) if isinstance(value, dict) else value
        for key, value in mapping.items()
    }


def construct(kind: type, given: dict[str, SourcedValue], section: str, notes: Diagnostics) -> Any:
    """Make the dataclass `kind` from the keys it has; None, with problems noted, when that
    fails."""
    hints = typing.get_type_hints(kind)
    values = {}
    before = len(notes.problems)
    for entry in dataclasses.fields(kind):
        item = given.get(entry.name)
        if item is not None and item.value is not None:
            values[entry.name] = convert(item.value, hints[entry.name], item.where, notes)
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            notes.refuse(f"{section}.{entry.name} is missing: it has no default")
    if len(notes.problems) == before:
        return kind(**values)
    return None


def convert(value: Any, kind: Any, where: str, notes: Diagnostics) -> Any:
    """Convert a YAML value to the type of its key; None, with the problem noted, when it does not
    fit."""
    if typing.get_origin(kind) is types.UnionType:
        if isinstance(value, str) and value in NO_VALUE:
            return notes.refuse(f"{where}: {value} is a word to YAML; write null for no value")
        kind = next(member for member in typing.get_args(kind) if member is not types.NoneType)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            return notes.refuse(f"{where}: {value!r} must be a section with keys")
        value = spelled(value)
        for key in sorted(set(value) - field_names(kind)):
            notes.refuse(f"{where}.{key} is unknown{nearest(key, field_names(kind))}")
        given = {key: SourcedValue(item, f"{where}.{key}") for key, item in value.items()}
        return construct(kind, given, where, notes)
    if typing.get_origin(kind) is list:
        value = _unquoted(value)
        if not isinstance(value, list):
            return notes.refuse(f"{where}: {value!r} must be a list, such as [{value}]")
        member = typing.get_args(kind)[0]
        return [convert(item, member, f"{where}[{i}]", notes) for i, item in enumerate(value)]
    if typing.get_origin(kind) is dict and typing.get_args(kind)[1] is Any:
        if isinstance(value, dict):
            return spelled(value)
        return notes.refuse(f"{where}: {value!r} must be a section with keys")
    if typing.get_origin(kind) is dict:
        return _columns(value, where, notes)
    try:
        return _scalar(value, kind)
    except ValueError:
        return notes.refuse(f"{where}: {value!r} must be {WORDS[kind]}")
    except OverflowError:
        return notes.refuse(
            f"{where}: {value!r:.40} is too large: whole numbers go up to {LARGEST}"
        )


def _unquoted(value: Any) -> Any:
    """A list that was written in quotes, "[acc, format]", as the list it is."""
    if not isinstance(value, str) or not value.strip().startswith("["):
        return value
    try:
        return parse(value)
    except yaml.YAMLError:
        return value


def _columns(value: Any, where: str, notes: Diagnostics) -> dict[str, str] | None:
    """Read map_keys: a mapping of some parts to columns, or one as a JSON string."""
    parts = ("prompt", "query", "response", "system")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            return notes.refuse(f"{where}: {value!r} is not a JSON object: {error}")
    if not isinstance(value, dict) or not all(
        isinstance(column, str | None) for column in value.values()
    ):
        return notes.refuse(
            f"{where}: {value!r} must map {', '.join(parts)} to columns of the data"
        )
    value = spelled(value)
    for part in sorted(set(value) - set(parts)):
        notes.refuse(
            f"{where}.{part} is unknown{nearest(part, parts)}; known are {', '.join(parts)}"
        )
    return {part: column or "" for part, column in value.items()}


def _scalar(value: Any, kind: type) -> Any:
    """Convert without loss; `1e-6`, which YAML 1.1 reads as text, is a number. ValueError when it
    is none.

    OverflowError for one that is too large.
    """
    if kind is bool:
        words = {"true": True, "false": False}
        if isinstance(value, bool) or str(value).lower() in words:
            return words[str(value).lower()]
    elif isinstance(value, bool) or not isinstance(value, str | int | float):
        pass
    elif kind is str:
        text = str(value).removesuffix("\n")  # which a block of several lines ends with
        if not UNWRITABLE.search(text):
            return text
    elif kind is float and math.isfinite(float(value)):
        return float(value)
    elif kind is int and (isinstance(value, int) or float(value).is_integer()):
        if abs(number := int(value) if isinstance(value, int) else int(float(value))) > LARGEST:
            raise OverflowError(value)
        return number
    raise ValueError(value)
