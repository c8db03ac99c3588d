"""Rounds of dynamic sampling: how many prompts to draw for groups that were dropped.

DAPO (arXiv:2503.14476, section 3.2) draws until a batch is full of groups that teach something. Here
a round is as large as it should be by what was kept before, and there are only so many of them.
"""

from __future__ import annotations

LEAST_KEPT = (
    8  # one of so many: what a round counts on at least, so that it cannot grow without end
)


def round_size(missing: int, kept: int, drawn: int) -> int:
    """Prompts to draw so that about `missing` groups are kept, if `kept` of `drawn` were before.

    In whole numbers, and whatever the replicas: so the same prompts are drawn on every layout.

    >>> (
    ...     round_size(2, kept=2, drawn=4),
    ...     round_size(2, kept=0, drawn=4),
    ...     round_size(4, kept=0, drawn=0),
    ... )
    (4, 16, 4)
    """
    if not drawn:
        return missing
    if kept * LEAST_KEPT < drawn:
        return missing * LEAST_KEPT
    return -(-missing * drawn // kept)
