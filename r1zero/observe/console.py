"""What the console shows of a step: one line, aligned with those of the other steps."""

from __future__ import annotations

from collections.abc import Mapping

from r1zero.observe.model_summary import MEAN_KEY
from r1zero.scores import MODEL, Outcome

# What stands before a metric, the metric, its format, its unit.
_COLUMNS = (
    ("length ", "response_length/mean", "6.1f", ""),
    ("cut ", "response_truncated", "4.0%", ""),
    ("kl ", "kl", "7.4f", ""),
    ("entropy ", "entropy", "6.3f", ""),
    ("grad ", "grad_norm", "6.2f", ""),
    ("mismatch ", "mismatch/mean", ".1e", ""),
    ("", "throughput/tokens_per_second", "6.0f", " tok/s"),
    ("", "time/step", "6.1f", " s"),
)
TOO_LONG_KEY = f"{MEAN_KEY}/{Outcome.TOO_LONG.name.lower()}"  # there even if it read nothing


def step_line(m: Mapping[str, float], total: int) -> str:
    """One line of a step; the columns of all steps stand below each other.

    A metric that the step does not have, such as the KL of one in which no group trained, is a
    dash.
    """
    width = len(str(total))
    rights = [key for key in m if key.endswith("/right")]
    parts = [f"step {m['step']:>{width}}/{total}", f"reward {_cell(m, 'reward/mean', '+.3f')}"]
    parts.append("  ".join(f"{key.split('/')[1]} {_cell(m, key, '4.0%')}" for key in rights))
    if MEAN_KEY in m or TOO_LONG_KEY in m:  # a run with a reward model
        parts.append(f"{MODEL} {_cell(m, MEAN_KEY, '+.3f')}")
    for before, key, form, behind in _COLUMNS:
        parts.append(f"{before}{_cell(m, key, form)}{behind}")
    return "  ".join(parts)


def _cell(m: Mapping[str, float], key: str, form: str) -> str:
    """A value in its format, or a dash of the same width."""
    if key not in m:
        return "-".rjust(len(format(0.0, form)))
    return format(m[key], form)
