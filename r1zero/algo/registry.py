"""Registry (plugin table) of losses, advantages and aggregations: built-in by name, own by place.

A built-in function is found by the name of its file, or is entered with `@TABLE.add`. An own one is
written as `package.module:function` or `path/to/file.py:function`. Checking names imports no torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from r1zero.errors import BadInput, nearest

T = TypeVar("T", bound=Callable[..., Any])


class Table(Generic[T]):
    """The functions that one configuration key chooses from."""

    def __init__(
        self, key: str, package: str | None = None, refused: Mapping[str, str] | None = None
    ) -> None:
        """`key` stands in messages; in the folder `package` the file x.py holds the function x.

        `refused` are names known elsewhere, with the reason why they are not here.
        """
        self.key = key
        self._refused = refused or {}
        self._package = package
        self._entries: dict[str, T] = {}

    def add(self, function: T) -> T:
        """Enter a function under its own name (decorator)."""
        name = function.__name__
        assert name not in self._entries, name
        self._entries[name] = function
        return function

    def names(self) -> list[str]:
        """All built-in names. Imports nothing."""
        return sorted({*self._entries, *self._files()})

    def problems(self, name: str, key: str | None = None) -> list[str]:
        """Return a sentence if `name`, given for `key`, names no function. Imports nothing."""
        key = key or self.key
        if ":" in name:
            return [f"{key}: {problem}" for problem in _place_problems(name)]
        known = self.names()
        if name in known:
            return []
        choices = ", ".join(known)
        hint = (
            self._refused.get(name)
            or nearest(name, known)
            or "; your own is module:function or path.py:function"
        )
        return [f"{key}: {name} is not one of {choices}{hint}"]

    def __getitem__(self, name: str) -> T:
        """Return the function of this name, imported when asked for. BadInput for none."""
        problems = self.problems(name)
        if problems:
            raise BadInput(problems[0])
        if ":" in name:
            return load_own(self.key, name)
        if name not in self._entries:
            module = importlib.import_module(f"{self._package}.{name}")
            self._entries[name] = getattr(module, name)
        return self._entries[name]

    def _files(self) -> list[str]:
        """Names of the modules in the package, read from its folder."""
        if self._package is None:
            return []
        folder = importlib.import_module(self._package).__path__
        return [module.name for module in pkgutil.iter_modules(folder)]


@cache
def load_own(key: str, name: str) -> Any:
    """Import `module:function` or `path.py:function`. BadInput when that fails, for any reason."""
    place, _, function = name.rpartition(":")
    try:
        if place.endswith(".py"):
            module = _import_file(Path(place))
        else:
            module = importlib.import_module(place)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - code of the user: anything may happen
        raise BadInput(
            f"{key}: {name} cannot be loaded: {type(error).__name__}: {error}; "
            "mend it, or name a function that can"
        ) from None
    found = vars(module).get(function)
    if found is None:
        hint = nearest(function, vars(module))
        raise BadInput(f"{key}: {name}: {place} has no {function}{hint}")
    if not callable(found):
        raise BadInput(f"{key}: {name}: {function} in {place} is no function; name one")
    return found


def own_files(names: list[str]) -> list[str]:
    """Paths of the files among names that are written as `path.py:function`."""
    places = [name.rpartition(":")[0] for name in names]
    return [place for place in places if place.endswith(".py")]


def _place_problems(name: str) -> list[str]:
    """Return a sentence if this cannot name a function; nothing is loaded."""
    place, _, function = name.rpartition(":")
    is_file = place.endswith(".py")
    is_module = all(part.isidentifier() for part in place.split("."))
    if not function.isidentifier() or not (is_file or is_module):
        return [
            f"{name} names no function; write package.module:function or path/to/file.py:function"
        ]
    if is_file and not Path(place).is_file():
        return [f"{name}: there is no file {place}; relative paths start at the current directory"]
    return []


def _import_file(path: Path) -> ModuleType:
    # Named by its whole path: that shadows no other module.
    spec = importlib.util.spec_from_file_location(str(path), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
