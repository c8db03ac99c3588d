"""Reward functions of the user's own, asked what they declare in a process of its own.

Ranks run no code that only the workers need: a function may load tables or libraries, hang or end
its process when it is imported, and the configuration is refused with a sentence.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

from r1zero.config.own_code import own_name
from r1zero.errors import BadInput
from r1zero.reward.config import RewardConfig
from r1zero.reward.functions import REWARD_FUNCTIONS
from r1zero.reward.types import Declaration, FunctionSettings
from r1zero.reward.worker import PROGRAM, setup_message, unframe

IMPORT_SECONDS = 60.0  # for a reward function to be imported


def describe(names: Sequence[str], settings: FunctionSettings) -> dict[str, Declaration]:
    """Return what each of the user's own functions declares.

    BadInput with all that is wrong with them or their settings.
    """
    if not names:
        return {}
    of_these = {name: settings[name] for name in map(own_name, names) if name in settings}
    return _describe(tuple(names), json.dumps(of_these))


@cache
def _describe(names: tuple[str, ...], settings: str) -> dict[str, Declaration]:
    config = RewardConfig(names=names, weights=[0.0] * len(names), settings=json.loads(settings))
    key = REWARD_FUNCTIONS.key
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input=setup_message(config.of_worker),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BadInput(
            f"{key}: {', '.join(names)} cannot be loaded: this takes more than "
            f"{IMPORT_SECONDS:.0f} s; do less when the module is imported"
        ) from None
    body = unframe(bytearray(done.stdout))
    if body is None:
        raise BadInput(
            f"{key}: {', '.join(names)} cannot be loaded: the process that imports ended with "
            f"status {done.returncode}; mend it, or name a function that can"
        )
    ready = json.loads(body)
    if ready["broken"]:
        raise BadInput(ready["broken"])
    return {name: _declaration(declared) for name, declared in ready["declared"].items()}


def _declaration(told: dict[str, Any]) -> Declaration:
    """From JSON, which has no tuples."""
    return Declaration(**told | {"columns": tuple(told["columns"])})
