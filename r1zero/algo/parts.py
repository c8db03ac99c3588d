"""Cutting a global batch into the parts in which it travels from role to role.

What a group is wanted for decides where to cut. An optimizer step for each minibatch wants the first
minibatch whole before any of the second, so one minibatch is cut after the other. One that learns
from the whole batch, or a step later, wants whatever has ended, so the whole batch is cut by length;
then much ends with the longest responses, and these are cut by position, so that train learns from
one piece while ref looks back at the next.
"""

from __future__ import annotations

from collections.abc import Sequence

from r1zero.types import ANY_LENGTH, Part

MOST_PIECES = 4  # of the longest groups: in train each is a pipeline that fills and drains


def plan_parts(
    num_prompts: int, most: int, rounds: int, minibatches: int | None, longest: int
) -> tuple[Part, ...]:
    """Plan the parts of a batch, `most` at most.

    A replica fills its rows `rounds` times until all its samples have run. `minibatches` are learnt
    from one after the other; None if parts are, as they come. `longest` is what the longest response
    is expected to have, in tokens.
    """
    blocks = min(max(rounds, minibatches or 1), most)
    count = most // blocks
    pieces = 1
    if minibatches is None:
        pieces = max(1, min(MOST_PIECES, count // 4))
    return cut_parts(num_prompts, blocks, band_edges(count - pieces + 1, longest), pieces)


def band_edges(count: int, longest: int) -> list[int]:
    """Cut lengths into `count` bands through which the longest response grows in equal times, so
    that no group waits for more than one of them. Returns the largest lengths of all but the last,
    ascending; those that coincide count once.

    >>> band_edges(3, 90)
    [30, 60]
    """
    return sorted({longest * band // count for band in range(1, count)} - {0})


def cut_parts(
    num_prompts: int, blocks: int, edges: Sequence[int], pieces: int = 1
) -> tuple[Part, ...]:
    """Cut the positions into blocks, each block into bands of length that end at these edges, and
    what is longer into pieces.

    All samples of a block run at the same time, so its short groups end long before its long ones
    and need not wait for them; a group that waits for a free row has no length yet. Five prompts in
    two blocks with the edge 10 and two pieces:

        positions 0 1     lengths 0 to 10
        positions 0       lengths 11 and more
        positions 1       lengths 11 and more
        positions 2 3 4   lengths 0 to 10
        positions 2       lengths 11 and more
        positions 3 4     lengths 11 and more
    """
    parts = []
    for block in _cut(range(num_prompts), blocks):
        shortest = 0
        for edge in edges:
            parts.append(Part(block, range(shortest, edge + 1)))
            shortest = edge + 1
        for piece in _cut(block, pieces):
            parts.append(Part(piece, range(shortest, ANY_LENGTH)))
    return tuple(parts)


def shifted(parts: Sequence[Part], start: int) -> tuple[Part, ...]:
    """The same parts for positions that begin at `start`."""
    found = []
    for part in parts:
        positions = range(part.positions.start + start, part.positions.stop + start)
        found.append(Part(positions, part.lengths))
    return tuple(found)


def _cut(positions: range, count: int) -> list[range]:
    """Cut positions into so many ranges whose lengths differ by one at most."""
    size = len(positions)
    return [positions[size * cut // count : size * (cut + 1) // count] for cut in range(count)]
