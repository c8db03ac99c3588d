"""Text of configurations: YAML as version 1.2 reads it, and spellings that users bring along.

Reads files that are named and looks at nothing else.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from r1zero.errors import BadInput

# No size, count or seed needs a larger whole number, and libraries keep some of them in 32 bits.
LARGEST = 2**32 - 1
NO_VALUE = ("None", "none", "nil", "undefined")  # what other languages call null
UNWRITABLE = re.compile("[\0\r\n\ud800-\udfff]")  # what paths, terminals or sentences cannot hold

_BLANKS = "\u00a0\u2002\u2003\u2007\u202f\u3000"
_LOOKALIKE = re.compile(
    rf"""[ -]*(?:
        (?P<blank>[{_BLANKS}])                       # in front of a key
        | [\w.-]+(?:
            \s*(?P<colon>[\uff1a\ufe55\ua789])      # behind a key
            | :[ ]*(?P<behind>[{_BLANKS}])           # behind its colon
        ))""",
    re.VERBOSE,
)


# What PyYAML says, and what the user needs to hear.
_PLAINLY = {
    "character '\\t' that cannot start": "a tab stands where YAML takes blanks only",
    "found another document": "a second document begins here; keep one",
    "found unexpected end of stream": "a quotation mark or bracket is not closed",
    "found '<block mapping start>'": "this line is indented otherwise than those around it",
    "could not determine a constructor": "a tag (!) is not read here; write the value alone",
    "unconstructable recursive node": "an alias (*) stands in what it stands for",
    "found unhashable key": "a list or section cannot be a key",
}


class SourcedValue(NamedTuple):
    """A value as the user wrote it, and where."""

    value: Any
    where: str


class Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice, in either spelling, with two values is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, Any] = {}
        for key_node, value_node in node.value:
            value = self.construct_object(value_node, deep=True)
            key = str(key_node.value).replace("-", "_")
            if key != "<<" and seen.setdefault(key, value) != value:
                problem = f"{key} is given twice, as {seen[key]!r} and {value!r}; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        return super().construct_mapping(node, deep=True)


def _resolvers() -> dict[str, list[Any]]:
    """Read 12:00:00, dates and 017 as YAML 1.2 does: as texts.

    YAML 1.1 takes them for seconds, date objects and an octal number.
    """
    kept: dict[str, list[Any]] = {}
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
        for tag, pattern in resolvers:
            if tag.endswith(":int"):
                pattern = re.compile(r"^[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$")
            if not tag.endswith(":timestamp"):
                kept.setdefault(first, []).append((tag, pattern))
    return kept


Loader.yaml_implicit_resolvers = _resolvers()


def parse(text: str) -> Any:
    """Read YAML. yaml.YAMLError for all that is none, also for what PyYAML's constructors meet."""
    try:
        return yaml.load(text, Loader)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        # A tag such as !!int before a text.
        raise yaml.YAMLError(f"a value does not fit its tag: {error}") from None
    except RecursionError:
        raise yaml.YAMLError("brackets are nested too deep") from None


def parse_dumped(text: str) -> Any:
    """Read YAML that this program has written, in C where libyaml is there. yaml.YAMLError."""
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read a file that holds a YAML mapping. BadInput with file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        refuse_lookalikes(path, text)
        content = parse(text)
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        place = str(path)
        if error.problem_mark is not None:
            place += f", line {error.problem_mark.line + 1}"
        raise BadInput(f"{place}: {_plainly(str(error.problem))}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        if content is None:
            kind = "is empty"
        else:
            kind = f"holds a {type(content).__name__}"
        raise BadInput(f"{path} must hold sections such as `training:`, but {kind}")
    return content


def _plainly(problem: str) -> str:
    for piece, plain in _PLAINLY.items():
        if piece in problem:
            return plain
    return problem


def refuse_lookalikes(path: Path, text: str) -> None:
    """BadInput for blanks and colons of input methods or web pages where YAML has its own.

    They count behind a key or before it. YAML takes `lr：1e-6` with a full-width colon for a text,
    and complains about a line further down.
    """
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LOOKALIKE.match(line)
        if match is not None:
            found = match["blank"] or match["colon"] or match["behind"]
            meant = "a colon" if match["colon"] else "a blank"
            raise BadInput(
                f"{path}, line {number}: the character {found!r} (U+{ord(found):04X}) looks like "
                f"{meant} and is none to YAML; type {meant} instead"
            )


def read_json(path: Path) -> Any:
    """Read a JSON file. BadInput naming it."""
    try:
        if not path.is_file():  # a device may have no end
            raise FileNotFoundError("there is no such file")
        text = path.read_text(encoding="utf-8-sig")
        if text.startswith("version https://git-lfs"):
            raise BadInput(f"{path} is a pointer of Git LFS: `git lfs pull` gets the file")
        return json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as a JSON file: {error}") from None


def spelled(mapping: dict[Any, Any]) -> dict[str, Any]:
    """Spell all keys with underscores, also those of mappings inside."""
    result = {}
    for key, value in mapping.items():
        inside = spelled(value) if isinstance(value, dict) else value
        result[str(key).replace("-", "_")] = inside
    return result


def as_number(value: Any) -> Any:
    """A number in quotes, or `1e6`, which YAML 1.1 takes for a text, as the number it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def as_list(value: Any) -> Any:
    """A list in quotes, "[acc, format]", as the list it is."""
    if not isinstance(value, str) or not value.strip().startswith("["):
        return value
    try:
        return parse(value)
    except yaml.YAMLError:
        return value
