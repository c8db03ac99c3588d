"""Environment variables that a library reads while it is imported or built."""

from __future__ import annotations

import os
from collections.abc import Mapping


def set_variables(needed: Mapping[str, str], wished: Mapping[str, str]) -> None:
    """Set variables of this process: those needed whatever they were, those wished unless the user
    has set them."""
    os.environ.update(needed)
    for name, value in wished.items():
        os.environ.setdefault(name, value)
