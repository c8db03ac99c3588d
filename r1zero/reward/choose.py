"""The reward functions of a run: names and settings checked, and what each declares.

What a function of the user's own declares is asked of a process of its own (reward/own.py), so that
no rank runs code that only the workers need.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r1zero.config.own_code import is_own, own_name
from r1zero.config.settings import Given, as_given, default_settings, read_settings
from r1zero.errors import BadInput, Diagnostics, nearest
from r1zero.reward.functions import REWARD_FUNCTIONS
from r1zero.reward.loaded import load_function, settings_name, shown_name
from r1zero.reward.own import describe
from r1zero.reward.types import Declaration, FunctionSettings


@dataclass(frozen=True, slots=True)
class Chosen:
    """A reward function of a run, without the function itself."""

    name: str  # as configured
    declared: Declaration


def choose(
    names: Sequence[str], settings: FunctionSettings, key: str = REWARD_FUNCTIONS.key
) -> dict[str, Chosen]:
    """Return the named reward functions in order, by their shown names.

    BadInput for names, given for `key`, and settings that cannot be.
    """
    problems = check_names(names, key) or _check_settings_names(names, settings)
    if problems:
        raise BadInput("\n".join(problems))
    chosen = _chosen(names, settings)
    problems = _missing_verdict(chosen, key)
    if problems:
        raise BadInput("\n".join(problems))
    return chosen


def _chosen(names: Sequence[str], settings: FunctionSettings) -> dict[str, Chosen]:
    """Reward functions that there are, by their shown names, with what they declare."""
    own = describe([name for name in names if is_own(name)], settings)
    chosen = {}
    for name in names:
        declared = own[name] if is_own(name) else load_function(name, settings).declared
        chosen[shown_name(name)] = Chosen(name, declared)
    return chosen


def check_each(lists: Mapping[str, Sequence[str]], settings: FunctionSettings) -> list[str]:
    """Return a sentence for everything that is wrong with the reward functions of several data sets,
    each list under its key, and with their settings."""
    problems: dict[str, None] = {}
    for key, names in lists.items():
        problems |= dict.fromkeys(check_names(names, key))
    everything = list(dict.fromkeys(name for names in lists.values() for name in names))
    if not problems:
        problems |= dict.fromkeys(_check_settings_names(everything, settings))
    for key, names in lists.items():
        if problems:
            break
        try:
            choose(names, settings_of(names, settings), key)
        except BadInput as error:
            problems |= dict.fromkeys(str(error).splitlines())
    return list(problems)


def gives_verdict(names: Sequence[str], settings: FunctionSettings) -> bool:
    """Whether one of these reward functions says which responses are right. BadInput for those that
    cannot be chosen."""
    chosen = _chosen(names, settings_of(names, settings))
    return any(each.declared.gives_verdict for each in chosen.values())


def settings_of(names: Sequence[str], settings: FunctionSettings) -> FunctionSettings:
    """The settings without those of functions of the user's own that are not among these."""
    known = {*REWARD_FUNCTIONS.names(), *(own_name(name) for name in names if is_own(name))}
    return {name: values for name, values in settings.items() if name in known}


def check_names(names: Sequence[str], key: str = REWARD_FUNCTIONS.key) -> list[str]:
    """Return a sentence for everything that is wrong with a list of names. Runs no own code."""
    problems = [problem for name in names for problem in REWARD_FUNCTIONS.problems(name, key)]
    if not names or len({shown_name(name) for name in names}) < len(names):
        problems.append(
            f"{key}: {list(names)} must name at least one reward function, and each once"
        )
    return problems


def _check_settings_names(names: Sequence[str], settings: FunctionSettings) -> list[str]:
    """Each section of settings belongs to a reward function, and to one only."""
    builtin = set(REWARD_FUNCTIONS.names())
    own = [own_name(name) for name in names if is_own(name)]
    problems = [
        f"reward.settings.{name} is no reward function{nearest(name, [*builtin, *own])}"
        for name in settings
        if name not in builtin and name not in own
    ]
    chosen = [settings_name(name) for name in names if not is_own(name)] + own
    problems += [
        f"reward.settings.{name} could mean several of {list(names)}; rename one of your own"
        for name in settings
        if name in own and chosen.count(name) > 1
    ]
    return problems


def _missing_verdict(chosen: dict[str, Chosen], key: str) -> list[str]:
    if any(each.declared.gives_verdict for each in chosen.values()):
        return []
    return [
        f"{key}: {shown} depends on which responses are right: name acc, too"
        for shown, each in chosen.items()
        if each.declared.needs_verdict
    ]


def compares_answers(names: Sequence[str]) -> bool:
    """Whether a built-in function among these compares responses with right answers."""
    builtin = [name for name in names if not is_own(name) and not REWARD_FUNCTIONS.problems(name)]
    return any(REWARD_FUNCTIONS[name].declared.gives_verdict for name in builtin)


def kept_columns(names: Sequence[str], settings: FunctionSettings) -> dict[str, str]:
    """The columns of the data that these reward functions see, each with the name of one that does.

    None where the functions cannot be chosen, which is told by the checks.
    """
    try:
        chosen = choose(names, settings_of(names, settings))
    except BadInput:
        return {}
    return columns_of(chosen.values())


def columns_of(chosen: Iterable[Chosen]) -> dict[str, str]:
    """The columns that these see, each with the name of one that does."""
    return {column: each.name for each in chosen for column in each.declared.columns}


# -- settings -------------------------------------------------------------------------------------


def read_reward_settings(given: Given, notes: Diagnostics) -> dict[str, dict[str, Any]]:
    """Convert and complete the settings of all built-in reward functions; mistakes are noted.

    Those of the user's own are left to the processes that hold the functions.
    """
    settings = as_given(given, notes)
    for name in REWARD_FUNCTIONS.names():
        function = REWARD_FUNCTIONS[name]
        section = f"reward.settings.{name}"
        if function.declared.shares:
            if name in given:
                notes.refuse(f"{section}: it takes those of {function.declared.shares}; give these")
            continue
        if given.get(name):
            found = read_settings(function.function, given[name], section, notes)
        else:
            found = default_settings(function.function)
        if found:
            settings[name] = found
    return settings
