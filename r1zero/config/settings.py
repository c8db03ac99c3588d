"""Settings of functions: keyword-only arguments that the configuration gives values to.

    def cosine(cases, *, right_short: Number = 2.0, exceeded: Number = -10.0): ...

is a section with the keys right_short and exceeded. The annotations convert and bound the values;
those of Python and those of `r1zero/config/keys.py` will do.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

from pydantic import ConfigDict, with_config

from r1zero.config import legacy
from r1zero.config.keys import Flag, Number, Text, Whole
from r1zero.config.parse import SourcedValue, spelled
from r1zero.config.validate import adapter, build
from r1zero.errors import Diagnostics

# Kinds of values, as the configuration converts them, of types and of defaults without one.
_KINDS: dict[type, Any] = {bool: Flag, int: Whole, float: Number, str: Text}


@cache
def settings_type(function: Callable[..., Any]) -> Any:
    """A dataclass with a key for each keyword-only argument of a function.

    Some error for a function whose annotations cannot be read: NameError for one that means nothing
    in its module, one of pydantic for a type that no value of a configuration has.
    """
    parameters = inspect.signature(function).parameters.values()
    own = [each for each in parameters if each.kind is each.KEYWORD_ONLY]
    hints = _hints(function, own)
    fields = []
    for parameter in own:
        entry: Any = dataclasses.field()
        if parameter.default is not parameter.empty:
            entry = dataclasses.field(default_factory=partial(copy.deepcopy, parameter.default))
        fields.append((parameter.name, hints[parameter.name], entry))
    name = f"{function.__name__}_settings"
    made = dataclasses.make_dataclass(name, fields, frozen=True, kw_only=True)
    kind = with_config(ConfigDict(extra="forbid"))(made)
    adapter(kind)
    return kind


def _hints(function: Callable[..., Any], parameters: list[inspect.Parameter]) -> dict[str, Any]:
    """The type of each parameter: as annotated, else as its default, else a number."""
    found: dict[str, Any] = {}
    for each in parameters:
        if each.annotation is not each.empty:
            found[each.name] = each.annotation
        elif each.default is not each.empty:
            found[each.name] = type(each.default)
        else:
            found[each.name] = float
    holder = type("Holder", (), {"__annotations__": found})
    names = getattr(function, "__globals__", {})
    hints = typing.get_type_hints(holder, names, include_extras=True)
    return {name: _KINDS.get(hint, hint) for name, hint in hints.items()}


def read_settings(
    function: Callable[..., Any],
    given: Mapping[str, SourcedValue],
    section: str,
    notes: Diagnostics,
) -> dict[str, Any]:
    """The settings given, converted, and the defaults of the others but null; mistakes are noted."""
    before = len(notes.problems)
    try:
        kind = settings_type(function)
    except Exception as error:  # noqa: BLE001 - code of the user: anything may happen
        reason = str(error).partition(". ")[0]
        notes.refuse(
            f"{section}: the keyword arguments of {function.__name__} cannot be read: "
            f"{type(error).__name__}: {reason}; annotate them with types such as float or str, "
            "imported where the function is"
        )
        return {}
    settings = build(kind, given, section, notes)
    if len(notes.problems) > before:
        return {}
    found = {entry.name: getattr(settings, entry.name) for entry in dataclasses.fields(settings)}
    return {name: value for name, value in found.items() if value is not None}


def default_settings(function: Callable[..., Any]) -> dict[str, Any]:
    """The defaults of its keyword-only arguments but null, as `read_settings` gives them where none
    is given.

    For functions of ours, each of whose settings has a default. Their annotations are not read,
    which takes longer than everything else in a configuration.
    """
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not None:
            assert parameter.default is not parameter.empty, f"{function.__name__}: {name}"
            found[name] = copy.deepcopy(parameter.default)
    return found


# -- sections by function -------------------------------------------------------------------------

# The settings of each function as they were given, by its name.
Given = dict[str, dict[str, SourcedValue]]
# Converts the settings of the functions that it knows; what it does not know stays as it is.
SettingsReader = Callable[[Given, Diagnostics], dict[str, dict[str, Any]]]


def as_given(given: Given, notes: Diagnostics) -> dict[str, dict[str, Any]]:
    """The reader that knows no function."""
    return {
        name: {key: item.value for key, item in values.items()} for name, values in given.items()
    }


def given_settings(reward: Mapping[str, Any], notes: Diagnostics) -> Given:
    """The settings in the section `reward`, by their place or by an older key, each given once."""
    found: Given = {}
    by_name = _section(reward.get("settings"), "reward.settings", notes)
    for name, values in by_name.items():
        where = f"reward.settings.{name}"
        found[name] = _sourced(_section(values, where, notes), where)
    for key, (name, *setting) in legacy.REWARD_SETTINGS.items():
        if reward.get(key) is None:
            continue
        if setting:
            older = {setting[0]: SourcedValue(reward[key], f"reward.{key}")}
        else:
            older = _sourced(_section(reward[key], f"reward.{key}", notes), f"reward.{key}")
        newer = found.setdefault(name, {})
        for twice in older.keys() & newer.keys():
            notes.refuse(f"{older[twice].where} is {newer[twice].where}; give one of them")
        found[name] = older | newer
    return found


def _section(value: Any, where: str, notes: Diagnostics) -> dict[str, Any]:
    """A mapping by names; none where there is nothing."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        notes.refuse(f"{where}: {value!r} must be a section with keys")
        return {}
    return spelled(value)


def _sourced(values: Mapping[str, Any], where: str) -> dict[str, SourcedValue]:
    """Each value with its place; one that is null has its default."""
    return {
        key: SourcedValue(value, f"{where}.{key}")
        for key, value in values.items()
        if value is not None
    }
