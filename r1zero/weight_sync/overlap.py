"""Overlaps of two layouts: which regions of a tensor one rank holds and another needs, cut to fit
buckets.

Pure arithmetic on boxes; no ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm, prod

from r1zero.models.layout import Box
from r1zero.models.params import CutAxis, ParamSpec, Shards, local_shape


@dataclass(frozen=True, slots=True)
class Cut:
    """A region of a tensor, or a part of one that fits a bucket. Tensors of one shape share it."""

    source: Box  # in the local view of the source's parameter
    target: Box  # in the local view of each receiver's parameter
    numel: int


@dataclass(frozen=True, slots=True)
class Overlap:
    """A region that some hold and some need."""

    holders: Sequence[int]  # parts of train that have it
    senders: Sequence[int]  # those of them that should send it
    source: Box
    target: Box


def overlaps(tensor: ParamSpec, train: Shards, target: Shards, needy: int) -> Iterator[Overlap]:
    """Yield the regions that make up part `needy` of what the target needs.

    Boxes count from the start of the rank's own part: of 12 columns, train TP 2 and rollout TP 3,
    r1 needs columns 4 to 7, which are

        from t0's 4:6 to r1's 0:2, and from t1's 0:2 to r1's 2:4.
    """
    whole = tuple(slice(0, size) for size in tensor.view)
    held = num_parts(train, tensor.cut)
    needed = num_parts(target, tensor.cut)
    if tensor.axis is None:
        # All hold it. It rides along with the cut tensors, so that it needs no process groups of
        # its own: in the drawing at the top r1 gets its norms from t0, r2 from t1.
        yield Overlap(range(held), partners(held, needed, needy), whole, whole)
        return
    # refuses parts that are not equal
    local_shape(tensor, train)
    local_shape(tensor, target)
    size = tensor.view[tensor.axis]
    for holder, start, stop in _intervals(size, held, needed, needy):
        source = list(whole)
        target_box = list(whole)
        for box, origin in (
            (source, holder * (size // held)),
            (target_box, needy * (size // needed)),
        ):
            box[tensor.axis] = slice(start - origin, stop - origin)
        yield Overlap([holder], [holder], tuple(source), tuple(target_box))


def partners(held: int, needed: int, needy: int) -> list[int]:
    """The parts of `held` that overlap with part `needy` of `needed`.

    >>> partners(16, 4, needy=1), partners(2, 3, needy=1)
    ([4, 5, 6, 7], [0, 1])
    """
    return [holder for holder, _, _ in _intervals(lcm(held, needed), held, needed, needy)]


def num_parts(shards: Shards, cut: CutAxis) -> int:
    """Into how many parts a role cuts what is cut by this."""
    return shards.ep if cut == "experts" else shards.tp


def _intervals(
    size: int, train_parts: int, target_parts: int, needy: int
) -> Iterator[tuple[int, int, int]]:
    """Yield (train part, start, stop), in global indices, of the overlaps with one part that is
    needed.

    12 columns, train TP 2 (0:6 and 6:12), rollout TP 3, of which 1 needs 4:8:

    >>> list(_intervals(12, 2, 3, needy=1))
    [(0, 4, 6), (1, 6, 8)]
    """
    held = size // train_parts
    needed = size // target_parts
    begin = needy * needed
    end = (needy + 1) * needed
    for holder in range(begin // held, -(-end // held)):
        yield holder, max(begin, holder * held), min(end, (holder + 1) * held)


def fitting_cuts(source: Box, target: Box, limit: int) -> list[Cut]:
    """Cut a region, as source and receivers see it, into parts of at most `limit` elements."""
    parts = zip(_cut(source, limit), _cut(target, limit), strict=True)
    return [Cut(held, needed, prod(shape_of(held))) for held, needed in parts]


def _cut(box: Box, limit: int) -> list[Box]:
    """Cut a box along its first axes until no part has more than `limit` elements.

    >>> rows_and_columns = (slice(0, 10), slice(0, 4))
    >>> [(rows.start, rows.stop) for rows, columns in _cut(rows_and_columns, limit=12)]
    [(0, 3), (3, 6), (6, 9), (9, 10)]

    A limit of 3 cuts each row, too, into columns 0:3 and 3:4.
    """
    shape = shape_of(box)
    if prod(shape) <= limit:
        return [box]
    axis = next(axis for axis, size in enumerate(shape) if size > 1)
    step = max(1, limit // (prod(shape) // shape[axis]))
    begin = box[axis].start
    end = box[axis].stop
    parts = [slice(start, min(start + step, end)) for start in range(begin, end, step)]
    result: list[Box] = []
    for part in parts:
        for small in _cut((*box[:axis], part, *box[axis + 1 :]), limit):
            result.append(small)
    return result


def shape_of(box: Box) -> tuple[int, ...]:
    return tuple(side.stop - side.start for side in box)
