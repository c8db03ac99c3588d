"""Cutting a global batch into the parts in which it travels from role to role."""

from __future__ import annotations

from collections.abc import Sequence

from r1zero.types import ANY_LENGTH, Part


def plan_parts(num_prompts: int, blocks: int, edges: Sequence[int]) -> tuple[Part, ...]:
    """Cut the positions into blocks, and each block into bands of length that end at these edges.

    All samples of a block run at the same time, so its short groups end long before its long ones
    and need not wait for them; a group that waits for a free row has no length yet. The last band
    takes what is longer than its edge, too. Five prompts in two blocks with the edges 10 and 30:

        positions 0 1     lengths 0 to 10, 11 and more
        positions 2 3 4   lengths 0 to 10, 11 and more
    """
    parts = []
    for block in range(blocks):
        begin = num_prompts * block // blocks
        end = num_prompts * (block + 1) // blocks
        shortest = 0
        for edge in edges[:-1]:
            parts.append(Part(range(begin, end), range(shortest, edge + 1)))
            shortest = edge + 1
        parts.append(Part(range(begin, end), range(shortest, ANY_LENGTH)))
    return tuple(parts)


def count_blocks(samples: int, rows: int, most: int) -> int:
    """How many blocks a replica's samples need when so many run at a time; `most` at most."""
    return max(1, min(most, -(-samples // rows)))
