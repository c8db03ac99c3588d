"""Which tests are fast: those that start no process, found by following what their code calls.

A test carries `ranks` when it, a fixture of it or a helper of the tests that one of them calls uses
run_ranks or a module that starts processes, and `browser` when it needs Chromium. `slow` is written
at the test by hand, and so is `ranks` where the package starts processes for it. A test with none
is `fast`.
"""

from __future__ import annotations

import functools
import multiprocessing
import pty
import subprocess
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
STARTERS = (multiprocessing, pty, subprocess)
BY_HAND = {"ranks", "slow"}


def marks_of(
    test: Callable[..., Any],
    fixtures: Iterable[Callable[..., Any]],
    names: Iterable[str],
    own: Iterable[str],
) -> set[str]:
    """The marks that a test gets beside its own.

    `fixtures` are the functions behind the fixtures it uses, `names` their names.
    """
    marks = set()
    if "browser" in names:
        marks.add("browser")
    if any(starts_processes(function) for function in (test, *fixtures)):
        marks.add("ranks")
    if not marks and not BY_HAND.intersection(own):
        marks.add("fast")
    return marks


@functools.cache
def starts_processes(function: Callable[..., Any]) -> bool:
    """Whether this function of the tests starts processes, or one that it names does."""
    seen = set()
    waiting: list[Any] = [function]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for value in _named_by(current):
            if any(value is starter for starter in STARTERS) or isinstance(value, BaseContext):
                return True
            waiting.extend(function for function in _functions_of(value) if _is_ours(function))
    return False


def _named_by(function: FunctionType) -> Iterator[Any]:
    """The global values that a function names, in nested functions, too."""
    codes: list[CodeType] = [function.__code__]
    while codes:
        code = codes.pop()
        codes.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
        for name in code.co_names:
            yield function.__globals__.get(name)


def _functions_of(value: Any) -> list[FunctionType]:
    """A function itself, the methods of a class."""
    if isinstance(value, type):
        return [part for part in vars(value).values() if isinstance(part, FunctionType)]
    return [value] if isinstance(value, FunctionType) else []


def _is_ours(function: FunctionType) -> bool:
    return Path(function.__code__.co_filename).is_relative_to(TESTS)
