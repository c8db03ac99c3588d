"""Waiting in tests: time limits and polling that do not depend on how fast or busy a machine is.

What a test waits for comes soon or never. So a limit only has to end a test that would hang: it is
far above what a busy machine needs, and no test asserts that something took a few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

LONG = 300.0  # seconds


def wait_until(happened: Callable[[], object], seconds: float = LONG) -> None:
    """Return when something is so; fails when that takes longer than any machine would."""
    limit = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < limit, f"not within {seconds:.0f} s"
        time.sleep(0.01)
