"""Registry (plugin table) of losses, advantages, reward functions: built-in by name, own by place.

A built-in function is found by the name of its file, or is entered with `@TABLE.add`. An own one is
written as `package.module:function` or `path/to/file.py:function`. Checking names imports no torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from r1zero.config.own_code import is_own, load_own, place_problems
from r1zero.errors import BadInput, nearest

T = TypeVar("T", bound=Callable[..., Any])


class Table(Generic[T]):
    """The functions that one configuration key chooses from."""

    def __init__(
        self,
        key: str,
        package: str | None = None,
        refused: Mapping[str, str] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        """`key` stands in messages; in the folder `package` the file x.py holds the function x.

        `refused` are names known elsewhere, with the reason why they are not here; `aliases` are
        older names of functions.
        """
        self.key = key
        self._refused = refused or {}
        self._aliases = aliases or {}
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
        if is_own(name):
            return [f"{key}: {problem}" for problem in place_problems(name)]
        known = self.names()
        if name in known or name in self._aliases:
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
        if is_own(name):
            return load_own(self.key, name)
        name = self._aliases.get(name, name)
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
