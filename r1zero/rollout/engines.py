"""The table of rollout engines, `actor_rollout.engine`: where the class of each is.

Nothing is imported before an engine is asked for, so one may need packages that others do not.
"""

from __future__ import annotations

import importlib.util

from r1zero.config.own_code import is_own, load_own, place_problems
from r1zero.errors import BadInput, nearest
from r1zero.models.layout import WeightLayout
from r1zero.rollout.interface import EngineKind

KEY = "actor_rollout.engine"
ENGINES = {
    "native": "r1zero.rollout.engine:NativeEngine",
    "vllm": "r1zero.rollout.vllm.engine:VllmEngine",
}
# A package that an engine needs beside ours, and where it comes from.
NEEDS = {
    "vllm": (
        "vllm",
        "start with the Python of an environment that has it: tools/setup_vllm_env.sh makes one for "
        "CPUs, docs/rollout.md names the versions for NPUs",
    ),
}


def engine_problems(name: str, key: str = KEY) -> list[str]:
    """Return a sentence, which begins with `key`, if there is no such engine, or not
    what it needs. A class of the user's is loaded, ours is not: it needs torch."""
    if not is_own(name):
        if name in ENGINES:
            return _absent_package(name, key)
        hint = nearest(name, ENGINES) or "; your own is module:class or path.py:class"
        return [f"{key}: {name} is not one of {', '.join(ENGINES)}{hint}"]
    problems = place_problems(name, "class")
    if problems:
        return [f"{key}: {problem}" for problem in problems]
    try:
        choose_engine(name, key)
    except BadInput as error:
        return [str(error)]
    return []


def _absent_package(name: str, key: str) -> list[str]:
    """Return a sentence if an engine of the table lacks a package here. Nothing is imported."""
    if name not in NEEDS:
        return []
    package, way_out = NEEDS[name]
    if importlib.util.find_spec(package) is not None:
        return []
    return [f"{key}: {name} needs the package {package}, which is not installed; {way_out}"]


def choose_engine(name: str, key: str = KEY) -> EngineKind:
    """Import the class of an engine. BadInput when that fails, or when it is no such class."""
    kind = load_own(key, ENGINES.get(name, name), "class")
    is_engine = isinstance(getattr(kind, "layout", None), WeightLayout)
    if not is_engine or not callable(getattr(kind, "build", None)):
        raise BadInput(
            f"{key}: {name} is no rollout engine: it needs a `layout` and a class method `build` "
            "(EngineKind in r1zero/rollout/interface.py)"
        )
    return kind
