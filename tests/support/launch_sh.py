"""launch.sh as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.patience import LONG

ROOT = Path(__file__).resolve().parents[2]


def launch(*arguments: str, **variables: str) -> tuple[int, str, str]:
    """Run it without its set-up; exit code, standard output, standard error."""
    environment = os.environ | {"R1ZERO_SETUP": "0", "R1ZERO_PYTHON": sys.executable} | variables
    done = subprocess.run(
        ["bash", str(ROOT / "launch.sh"), *arguments],
        text=True,
        capture_output=True,
        timeout=LONG,
        env=environment,
    )
    return done.returncode, done.stdout, done.stderr
