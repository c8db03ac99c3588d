"""The reward functions themselves with their settings, as a worker calls them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from r1zero.config.own_code import is_own, load_own, own_name, short_name
from r1zero.config.parse import SourcedValue
from r1zero.config.settings import read_settings, settings_type
from r1zero.errors import BadInput, Diagnostics
from r1zero.reward.functions import REWARD_FUNCTIONS, RewardFunction, as_reward_function
from r1zero.reward.types import Declaration, FunctionSettings, RewardInput
from r1zero.scores import Score


@dataclass(frozen=True, slots=True)
class LoadedFunction:
    """A reward function, ready to be called."""

    name: str  # as configured
    function: RewardFunction
    settings: dict[str, Any]

    @property
    def declared(self) -> Declaration:
        """What it declares; its value of a failure is a number."""
        declared = self.function.declared
        if isinstance(declared.failed, str):
            return dataclasses.replace(declared, failed=float(self.settings[declared.failed]))
        return declared

    def score(self, cases: Sequence[RewardInput]) -> list[Score]:
        """Score responses, in order; see RewardFunction."""
        return self.function.score(self.name, cases, self.settings)


def shown_name(name: str) -> str:
    """Return what metrics and samples call a reward function."""
    if is_own(name):
        return short_name(name)
    return name


def settings_name(name: str) -> str:
    """The key of a reward function's settings below reward.settings."""
    if is_own(name):
        return own_name(name)
    function = REWARD_FUNCTIONS[name]
    return function.declared.shares or function.__name__


def load_functions(names: Sequence[str], settings: FunctionSettings) -> dict[str, LoadedFunction]:
    """Load the reward functions of a run, by their shown names. BadInput with all that is wrong."""
    found = {}
    problems = []
    for name in names:
        try:
            found[shown_name(name)] = load_function(name, settings)
        except BadInput as error:
            problems.append(str(error))
    if problems:
        raise BadInput("\n".join(problems))
    return found


def load_function(name: str, settings: FunctionSettings) -> LoadedFunction:
    """Load one reward function and give it its settings. BadInput for what cannot be."""
    if is_own(name):
        function = as_reward_function(load_own(REWARD_FUNCTIONS.key, name))
        owner = function
    else:
        function = REWARD_FUNCTIONS[name]
        owner = REWARD_FUNCTIONS[function.declared.shares or name]
    key = settings_name(name)
    section = f"reward.settings.{key}"
    given = settings.get(key, {})
    sourced = {each: SourcedValue(value, f"{section}.{each}") for each, value in given.items()}
    notes = Diagnostics()
    complete = read_settings(owner.function, sourced, section, notes)
    if notes.problems:
        raise BadInput("\n".join(notes.problems))
    accepted = {entry.name for entry in dataclasses.fields(settings_type(function.function))}
    own = {each: value for each, value in complete.items() if each in accepted}
    return LoadedFunction(name, function, own)
