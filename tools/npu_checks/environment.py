"""Item `environment`: the variables of NPUs as a run would have them, and what is wrong with the
user's."""

from __future__ import annotations

import os
from dataclasses import asdict

from npu_checks.check import Check, CheckFailed, Figures
from r1zero.distributed.npu_environment import environment_table
from r1zero.preflight.environment import Asked, environment_notes, environment_problems


def run(check: Check) -> Figures:
    """Judge the variables that the user has set."""
    asked = Asked()
    rows = environment_table(os.environ, asked.wait)
    if problems := environment_problems(os.environ, asked):
        raise CheckFailed(
            "; ".join(problems), "set what is named, or unset it: docs/environment.md"
        )
    yours = [f"{row.name}={row.value}" for row in rows if row.is_users]
    ours = [f"{row.name}={row.value}" for row in rows if not row.is_users]
    line = f"yours {' '.join(yours) or 'none'}; ours {', '.join(ours)}"
    notes = environment_notes(os.environ, asked)
    if notes:
        line += f"; note: {'; '.join(notes)}"
    return Figures(line, {"variables": [asdict(row) for row in rows], "notes": notes})
