"""The user's own code (plugins), named in the configuration and imported by name.

It is written as `package.module:name` or `path/to/file.py:name`, and is a function or a class.
Losses, advantages, aggregations, reward functions and engines of one's own all come in here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from r1zero.errors import BadInput, nearest

Kind = Literal["function", "class"]


def is_own(name: str) -> bool:
    """True for what names code by its place, False for the name of something built in."""
    return ":" in name


def short_name(name: str) -> str:
    """What metrics and logs call own code: `file.name` or `module.name`, without folders."""
    place, name = _split(name)
    if place.endswith(".py"):
        return f"{Path(place).stem}.{name}"
    return f"{place.rpartition('.')[2]}.{name}"


def own_name(name: str) -> str:
    """The name of own code in its file or module."""
    return _split(name)[1]


def own_files(names: Iterable[str]) -> list[str]:
    """Paths of the files among names that are written as `path.py:name`."""
    places = [_split(name)[0] for name in names]
    return [place for place in places if place.endswith(".py")]


def place_problems(name: str, kind: Kind = "function") -> list[str]:
    """Return a sentence if `name` cannot name own code. Nothing is imported."""
    place, own = _split(name)
    is_file = place.endswith(".py")
    is_module = all(part.isidentifier() for part in place.split("."))
    if not own.isidentifier() or not (is_file or is_module):
        return [f"{name} names no {kind}; write package.module:{kind} or path/to/file.py:{kind}"]
    if is_file and not Path(place).is_file():
        return [f"{name}: there is no file {place}; relative paths start at the current directory"]
    return []


def load_own(key: str, name: str, kind: Kind = "function") -> Any:
    """Import own code. BadInput, beginning with `key`, when that fails for any reason."""
    place, own = _split(name)
    try:
        module = _import(place)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - code of the user: anything may happen
        raise BadInput(
            f"{key}: {name} cannot be loaded: {type(error).__name__}: {error}; "
            f"mend it, or name a {kind} that can"
        ) from None
    found = vars(module).get(own)
    if found is None:
        raise BadInput(f"{key}: {name}: {place} has no {own}{nearest(own, vars(module))}")
    if not (isinstance(found, type) if kind == "class" else callable(found)):
        raise BadInput(f"{key}: {name}: {own} in {place} is no {kind}; name one")
    return found


def _split(name: str) -> tuple[str, str]:
    """The place and the name in it."""
    place, _, own = name.rpartition(":")
    return place, own


def _import(place: str) -> ModuleType:
    if place.endswith(".py"):
        return _import_file(Path(place).resolve())
    return importlib.import_module(place)


@cache
def _import_file(path: Path) -> ModuleType:
    # Named by its whole path: that shadows no other module.
    spec = importlib.util.spec_from_file_location(str(path), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
