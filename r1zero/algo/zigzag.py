"""Zigzag sharding for context parallelism: which tokens of a microbatch each CP rank computes.

Causal attention gives late tokens more work than early ones. So a segment of a microbatch is cut
into 2 CP chunks, and rank r takes chunks r and 2 CP - 1 - r: one early, one late, the same work for
all. 16 tokens with CP 2, and how many tokens each of them sees:

    chunk    0              1               2               3
    rank     0              1               1               0
    tokens   0  1  2  3     4  5  6  7      8  9 10 11     12 13 14 15
    sees     1  2  3  4     5  6  7  8      9 10 11 12     13 14 15 16

so rank 0 has 10 + 58 = 68 pairs of a query and a key, and rank 1 has 26 + 42 = 68. A response sees
its prompt besides, and the same holds. Segments whose chunks would be small are not cut so: they
follow each other, and every rank takes as many of their tokens as it lacks.

Keys and values of all ranks are gathered before attention (ops/token_gather.py). They lie there in
the order of the ranks, and `Segments.key_rows` are rows of that:

    row      0  1  2  3  4  5  6  7      8  9 10 11 12 13 14 15
    token    0  1  2  3 12 13 14 15      4  5  6  7  8  9 10 11
             rank 0                      rank 1

so the chunk 12 to 15 has the keys of rows 0 to 3, 8 to 15 and 4 to 7: all tokens in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from r1zero.algo.packing import Microbatch
from r1zero.ops.attention import Segments

# Smaller chunks are not worth a call of attention each.
SMALLEST_CHUNK = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive queries of one segment, and the keys that the last of them sees."""

    queries: range  # tokens of the microbatch
    keys: range  # entries of its key_rows

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        count = len(self.queries)
        prefix = len(self.keys) - count
        return count * prefix + count * (count + 1) // 2

    def cut(self, count: int) -> list[Piece]:
        """Cut a whole segment into consecutive pieces of about equal length.

        >>> for piece in Piece(queries=range(10, 14), keys=range(30, 37)).cut(2):
        ...     print(piece.queries, piece.keys)
        range(10, 12) range(30, 35)
        range(12, 14) range(30, 37)
        """
        length = len(self.queries)
        cuts = [number * length // count for number in range(count + 1)]
        return [self.part(first, stop) for first, stop in pairwise(cuts)]

    def part(self, first: int, stop: int) -> Piece:
        """Its queries from `first` up to `stop`, counted from its own first one."""
        begin = self.queries.start
        unseen = len(self.queries) - stop
        keys = range(self.keys.start, self.keys.stop - unseen)
        return Piece(range(begin + first, begin + stop), keys)


def shard(
    batch: Microbatch, ranks: int, rank: int, multiple_of: int, device: torch.device
) -> Microbatch:
    """One CP rank's part of a microbatch that lies on the host; returns it on the device.

    The parts of all ranks have the same number of tokens, a multiple of `multiple_of`. Where a part
    is shorter it is filled with copies of the microbatch's first tokens, which nothing else sees.
    """
    dealt = deal(batch.segments, ranks)
    length = -(-max(map(_count, dealt)) // multiple_of) * multiple_of
    rows = _gathered_rows(dealt, length, len(batch.tokens))
    tokens = torch.from_numpy(_tokens(dealt[rank], length, len(batch.tokens)))
    # Places in this part whose output predicts a token; those in other ranks' are outside of it.
    places = rows[batch.logit_positions.numpy()] - rank * length
    own_rows = np.flatnonzero((places >= 0) & (places < length))
    return Microbatch(
        items=batch.items,
        tokens=batch.tokens[tokens].to(device),
        positions=batch.positions[tokens].to(device),
        segments=_segments(batch.segments, dealt[rank], rows, rank, length, device),
        logit_positions=torch.from_numpy(places[own_rows]).to(device),
        targets=batch.targets.to(device),
        response_cu_seqlens=batch.response_cu_seqlens,
        own_rows=torch.from_numpy(own_rows).to(device),
        routes=None if batch.routes is None else batch.routes[tokens].to(device),
    )


def deal(segments: Segments, ranks: int) -> list[list[Piece]]:
    """Deal the segments of a microbatch to the ranks: the pieces of each."""
    dealt: list[list[Piece]] = [[] for _ in range(ranks)]
    short = []
    for segment in _pieces(segments):
        if len(segment.queries) < 2 * ranks * SMALLEST_CHUNK:
            short.append(segment)
            continue
        chunks = segment.cut(2 * ranks)
        for rank, pieces in enumerate(dealt):
            pieces += [chunks[rank], chunks[-1 - rank]]
    _fill_up(dealt, short, -(-segments.cu_seqlens_q[-1] // ranks))
    return dealt


def _fill_up(dealt: Sequence[list[Piece]], short: Sequence[Piece], length: int) -> None:
    """Give each rank as many tokens of the short segments as it lacks of `length`.

    With two ranks that have 0 and 3 tokens, segments of 4 and 5 tokens and a length of 6: 4 and 2 to
    the first, 3 to the second.
    """
    left = list(reversed(short))
    for pieces in dealt:
        room = length - _count(pieces)
        while left and room > 0:
            segment = left.pop()
            taken = min(room, len(segment.queries))
            pieces.append(segment.part(0, taken))
            room -= taken
            if taken < len(segment.queries):
                left.append(segment.part(taken, len(segment.queries)))
    assert not left, "ranks with more than `length` leave the others more room"


def _pieces(segments: Segments) -> Iterator[Piece]:
    """The whole segments."""
    query_ends = pairwise([0, *segments.cu_seqlens_q])
    key_ends = pairwise([0, *segments.cu_seqlens_k])
    for queries, keys in zip(query_ends, key_ends, strict=True):
        yield Piece(range(*queries), range(*keys))


def _count(pieces: Sequence[Piece]) -> int:
    """Tokens in some pieces."""
    return sum(len(piece.queries) for piece in pieces)


def _gathered_rows(dealt: Sequence[Sequence[Piece]], length: int, count: int) -> np.ndarray:
    """Where each token of the microbatch lies once all parts, `length` tokens each, are laid end to
    end: int64 [count]. The second table at the top, read by token."""
    rows = np.empty(count, dtype=np.int64)
    for rank, pieces in enumerate(dealt):
        row = rank * length
        for piece in pieces:
            stop = row + len(piece.queries)
            rows[piece.queries.start : piece.queries.stop] = np.arange(row, stop)
            row = stop
    return rows


def _tokens(pieces: Sequence[Piece], length: int, count: int) -> np.ndarray:
    """The tokens of a part, of `count` in the microbatch: int64 [length], filled up with the first
    ones."""
    parts = [np.arange(piece.queries.start, piece.queries.stop) for piece in pieces]
    parts.append(np.arange(length - _count(pieces)) % count)
    return np.concatenate(parts)


def _segments(
    whole: Segments,
    pieces: Sequence[Piece],
    rows: np.ndarray,
    rank: int,
    length: int,
    device: torch.device,
) -> Segments:
    """The segments of a part: its pieces, and what fills it up as one of its own."""
    assert whole.key_rows is not None, "a packed microbatch lists its keys"
    key_tokens = whole.key_rows.numpy()
    keys = [rows[key_tokens[piece.keys.start : piece.keys.stop]] for piece in pieces]
    counts = [len(piece.queries) for piece in pieces]
    filled = length - sum(counts)
    if filled:
        stop = (rank + 1) * length
        keys.append(np.arange(stop - filled, stop))
        counts.append(filled)
    return Segments(
        np.cumsum(counts).tolist(),
        np.cumsum([len(part) for part in keys]).tolist(),
        torch.from_numpy(np.concatenate(keys)).to(device),
    )
