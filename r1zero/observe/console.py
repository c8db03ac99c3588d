"""What the console shows of a step: one line, aligned with those of the other steps."""

from __future__ import annotations

from collections.abc import Mapping


def step_line(m: Mapping[str, float], total: int) -> str:
    """One line of a step; the columns of all steps stand below each other."""
    width = len(str(total))
    rules = "  ".join(
        f"{key.split('/')[1]} {value:4.0%}" for key, value in m.items() if key.endswith("/right")
    )
    return (
        f"step {m['step']:>{width}}/{total}  reward {m['reward/mean']:+.3f}  {rules}  "
        f"length {m['response_length/mean']:6.1f}  cut {m['response_truncated']:4.0%}  kl "
        f"{m['kl']:7.4f}  entropy {m['entropy']:6.3f}  grad {m['grad_norm']:6.2f}  mismatch "
        f"{m['mismatch/mean']:.1e}  {m['throughput/tokens_per_second']:6.0f} tok/s  "
        f"{m['time/step']:6.1f} s"
    )
