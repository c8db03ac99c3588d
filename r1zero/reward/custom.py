"""Custom reward functions: `package.module:function` or `path/to/file.py:function`.

Only the processes of the reward executor load and call them; whatever they do there, the run goes
on.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from numbers import Real
from pathlib import Path
from types import ModuleType

from r1zero.errors import BadInput, nearest
from r1zero.reward.types import CustomReward, RewardInput


def is_custom(name: str) -> bool:
    return ":" in name


def short_name(name: str) -> str:
    """Return what metrics and samples call a custom scorer: `file.function` or
    `module.function`."""
    place, _, function = name.rpartition(":")
    return f"{Path(place).stem if place.endswith('.py') else place.rpartition('.')[2]}.{function}"


def check_name(name: str) -> list[str]:
    """Return a sentence if this cannot name a function; nothing is loaded."""
    place, _, function = name.rpartition(":")
    dotted = all(part.isidentifier() for part in place.split("."))
    if not function.isidentifier() or not (place.endswith(".py") or dotted):
        return [
            f"{name} names no function; write package.module:function or path/to/file.py:function"
        ]
    if place.endswith(".py") and not Path(place).is_file():
        return [f"{name}: there is no file {place}; relative paths start at the current directory"]
    return []


@cache
def load(name: str) -> CustomReward:
    """Import a custom scorer. BadInput with a sentence when that fails, whatever the reason."""
    place, _, function = name.rpartition(":")
    try:
        if place.endswith(".py"):
            module = _file_module(Path(place))
        else:
            module = importlib.import_module(place)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - code of the user: anything may happen
        raise BadInput(f"{name} cannot be loaded: {type(error).__name__}: {error}") from None
    if function not in vars(module):
        raise BadInput(f"{name}: {place} has no {function}{nearest(function, vars(module))}")
    if not callable(vars(module)[function]):
        raise BadInput(f"{name}: {function} in {place} is no function")
    return vars(module)[function]


def _file_module(path: Path) -> ModuleType:
    # a name that shadows no other module
    spec = importlib.util.spec_from_file_location(str(path), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def grade(name: str, cases: Sequence[RewardInput]) -> list[float]:
    """Call a custom scorer. TypeError or ValueError when it does not return one finite number per
    case."""
    values = load(name)(cases)
    if not isinstance(values, Iterable):
        raise TypeError(
            f"{name} returned a {type(values).__name__}, not a list of {len(cases)} numbers"
        )
    values = list(values)
    if len(values) != len(cases):
        raise ValueError(f"{name} returned {len(values)} values for {len(cases)} responses")
    for at, value in enumerate(values):
        if not isinstance(value, Real):
            raise TypeError(f"{name} returned {value!r:.80} for response {at}, which is no number")
        if not math.isfinite(value):
            raise ValueError(f"{name} returned {value} for response {at}; values must be finite")
    return [float(value) for value in values]
