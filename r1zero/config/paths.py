"""Paths as people write them: `~`, `~name` and environment variables, expanded once, where they are
read."""

from __future__ import annotations

import os
import re
from pathlib import Path

from r1zero.errors import BadInput

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\}?)")


def expand(text: str) -> str:
    """Expand `~`, `$NAME` and `${NAME}` in a path, or in each part of a blend or of a reward
    function that holds paths.

    A path that exists as it is written stays as it is. BadInput for a variable that is not set, a
    user who is not known, and for `${oc.env:NAME}`, which is OmegaConf's.
    """
    if not ("~" in text or "$" in text) or os.path.lexists(text):
        return text
    return ",".join(_expanded(word) for word in text.split(","))


def user_path(text: str) -> Path:
    """argparse's type of a path; a shell leaves `~` alone in `--output=~/x`."""
    return Path(expand(text))


def _expanded(word: str) -> str:
    for match in _VARIABLE.finditer(word):
        name = match[1].removeprefix("{").removesuffix("}")
        if not re.fullmatch(r"\w+|\{\w+\}", match[1]):
            raise BadInput(
                f"{word} holds {match[0]}, which is not expanded here; write $NAME or ${{NAME}} "
                "for an environment variable, or the path itself"
            )
        if name not in os.environ:
            raise BadInput(
                f"{word} names the environment variable {name}, which is not set; set it, or "
                "write the path itself"
            )
    leading = len(word) - len(word.lstrip())  # a blend may have blanks behind its commas
    path = os.path.expandvars(word)
    known = os.path.expanduser(path[leading:])
    if known.startswith("~") and known.partition("/")[0] != "~":
        raise BadInput(
            f"{word} names the home of a user who is not known here; write the path itself"
        )
    return path[:leading] + known
