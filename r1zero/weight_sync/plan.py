"""The resharding plan of weight sync: who sends what to whom, computed alike everywhere.

Train ranks hold the model cut by TP and PP, in DP replicas; each rollout rank needs its TP shard.
For every tensor the plan intersects what is held with what is needed:

    linear_proj columns      0        n/4       n/2      3n/4       n
    train TP 2               |------- t0 -------|------- t1 -------|
    rollout TP 4             |-- r0 --|-- r1 ---|-- r2 ---|-- r3 --|   t0 -> r0, t0 -> r1, t1 -> r2, t1 -> r3

A piece with the same source and receivers as others shares flat buckets with them; a bucket is one
broadcast. Each rollout rank receives every element of its shard exactly once. A rank that holds
what it needs copies it.

Pure arithmetic: no collectives, no tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import lcm, prod

from r1zero.distributed.placement import RankGrid
from r1zero.models.layout import Box
from r1zero.models.params import ParamSpec, local_shape, stage_of

Route = tuple[int, tuple[int, ...]]  # source and receivers, global ranks


@dataclass(frozen=True, slots=True)
class Piece:
    """A region of one tensor, and its place in the bucket that carries it."""

    tensor: int  # index in Plan.tensors
    source: Box  # in the local view of the source's parameter
    target: Box  # in the local view of each receiver's parameter
    offset: int  # in the bucket, in elements

    @property
    def shape(self) -> tuple[int, ...]:
        return _shape(self.source)

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Pieces that travel together in one broadcast, or stay on a rank that is source and
    receiver."""

    source: int
    receivers: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        return sum(piece.numel for piece in self.pieces)

    @property
    def local(self) -> bool:
        return self.receivers == (self.source,)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The members of its broadcast, in ascending order."""
        return tuple(sorted({self.source, *self.receivers}))


@dataclass(frozen=True, slots=True)
class Plan:
    """Every bucket of a publication, in the order in which all ranks go through them."""

    tensors: tuple[ParamSpec, ...]
    train_tp: int
    rollout_tp: int
    buckets: tuple[Bucket, ...]

    def groups(self) -> list[tuple[int, ...]]:
        """List the rank sets that need a process group, once each, in an order equal on all
        ranks."""
        return list(dict.fromkeys(bucket.ranks for bucket in self.buckets if not bucket.local))

    def received(self, rank: int) -> int:
        """Count the elements that a publication puts into a rank's rollout weights."""
        return sum(bucket.numel for bucket in self.buckets if rank in bucket.receivers)


def plan(
    tensors: Sequence[ParamSpec],
    num_layers: int,
    train: RankGrid,
    rollout: RankGrid,
    element_size: int,
    bucket_bytes: int,
) -> Plan:
    """Lay out the publication of `tensors` (all of one dtype) in broadcasts of at most
    `bucket_bytes`.

    Replicas take turns as sources, the one that has sent least first, so that all links work.
    BadInput when TP does not divide a tensor or PP the layers.
    """
    assert rollout.pp == 1, "rollout ranks have no pipeline stages"
    limit = bucket_bytes // element_size
    assert limit > 0, f"a bucket of {bucket_bytes} bytes holds no element"
    sent = dict.fromkeys(train.ranks, 0)
    routes: dict[Route, list[tuple[int, Box, Box]]] = {}
    for index, tensor in enumerate(tensors):
        stage = stage_of(tensor, num_layers, train.pp)
        for needy in range(rollout.tp):
            receivers = [rollout.rank_at(tp=needy, dp=replica) for replica in range(rollout.dp)]
            for holders, senders, source, target in _overlaps(tensor, train.tp, rollout.tp, needy):
                held = [rank for rank in train.ranks if _is_at(train, rank, holders, stage)]
                able = [rank for rank in held if _is_at(train, rank, senders, stage)]
                for parts in zip(_cut(source, limit), _cut(target, limit), strict=True):
                    for route in _routes(held, able, receivers, sent, prod(_shape(parts[0]))):
                        routes.setdefault(route, []).append((index, *parts))
    chains = [_fill(route, pieces, limit) for route, pieces in routes.items()]
    # Round robin over the routes: with several buckets in flight, several sources send at a time.
    buckets = tuple(
        bucket for turn in zip_longest(*chains) for bucket in turn if bucket is not None
    )
    return Plan(tuple(tensors), train.tp, rollout.tp, buckets)


def _overlaps(
    tensor: ParamSpec, train_tp: int, rollout_tp: int, needy: int
) -> Iterator[tuple[Sequence[int], Sequence[int], Box, Box]]:
    """Yield the regions that make up the shard of rollout TP index `needy`.

    Each comes as (train TP indices that hold it, those that should send it, source box, target
    box). Boxes count from the start of the rank's own part: of 12 columns, train TP 2 and rollout
    TP 3, r1 needs columns 4 to 7, which are

        from t0's 4:6 to r1's 0:2, and from t1's 0:2 to r1's 2:4.
    """
    whole = tuple(slice(0, size) for size in tensor.view)
    if tensor.axis is None:
        # All hold it. It rides along with the cut tensors, so that it needs no process groups of
        # its own: in the drawing at the top r1 gets its norms from t0, r2 from t1.
        size = lcm(train_tp, rollout_tp)
        partners = [holder for holder, _, _ in _intervals(size, train_tp, rollout_tp, needy)]
        yield range(train_tp), partners, whole, whole
        return
    # refuses a TP that does not divide
    local_shape(tensor, train_tp), local_shape(tensor, rollout_tp)
    size = tensor.view[tensor.axis]
    for holder, start, stop in _intervals(size, train_tp, rollout_tp, needy):
        source = list(whole)
        target = list(whole)
        for box, origin in (
            (source, holder * (size // train_tp)),
            (target, needy * (size // rollout_tp)),
        ):
            box[tensor.axis] = slice(start - origin, stop - origin)
        yield (holder,), (holder,), tuple(source), tuple(target)


def _intervals(
    size: int, train_tp: int, rollout_tp: int, needy: int
) -> Iterator[tuple[int, int, int]]:
    """Yield (train TP index, start, stop), in global indices, of the overlaps with one rollout
    shard.

    12 columns, train TP 2 (0:6 and 6:12), rollout TP 3, of which 1 needs 4:8:

    >>> list(_intervals(12, 2, 3, needy=1))
    [(0, 4, 6), (1, 6, 8)]
    """
    held = size // train_tp
    needed = size // rollout_tp
    begin = needy * needed
    end = (needy + 1) * needed
    for holder in range(begin // held, -(-end // held)):
        yield holder, max(begin, holder * held), min(end, (holder + 1) * held)


def _is_at(span: RankGrid, rank: int, tps: Sequence[int], stage: int) -> bool:
    index = span.index_of(rank)
    return index["tp"] in tps and index["pp"] == stage


def _routes(
    held: list[int], able: list[int], receivers: list[int], sent: dict[int, int], numel: int
) -> Iterator[Route]:
    """Yield the moves of one region: local ones, and one broadcast to the receivers that do not
    hold it.

    Held by ranks 0 and 2, of which 2 has sent more, and needed by 2 and 5: 2 copies, 0 sends to 5.

    >>> list(_routes([0, 2], [0, 2], receivers=[2, 5], sent={0: 100, 2: 900}, numel=3))
    [(2, (2,)), (0, (5,))]
    """
    for rank in receivers:
        if rank in held:
            yield rank, (rank,)
    remote = tuple(rank for rank in receivers if rank not in held)
    if remote:
        source = min(able, key=lambda rank: (sent[rank], rank))
        sent[source] += numel
        yield source, remote


def _cut(box: Box, limit: int) -> list[Box]:
    """Cut a box along its first axes until no part has more than `limit` elements.

    >>> rows_and_columns = (slice(0, 10), slice(0, 4))
    >>> [(rows.start, rows.stop) for rows, columns in _cut(rows_and_columns, limit=12)]
    [(0, 3), (3, 6), (6, 9), (9, 10)]

    A limit of 3 cuts each row, too, into columns 0:3 and 3:4.
    """
    shape = _shape(box)
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


def _fill(route: Route, pieces: list[tuple[int, Box, Box]], limit: int) -> list[Bucket]:
    """Lay the pieces of a route into buckets, in their order.

    >>> pieces = [
    ...     (index, (slice(0, size),), (slice(0, size),)) for index, size in enumerate((5, 4, 3))
    ... ]
    >>> buckets = _fill((0, (8,)), pieces, limit=10)
    >>> [[piece.offset for piece in bucket.pieces] for bucket in buckets]
    [[0, 5], [0]]
    """
    buckets: list[list[Piece]] = []
    offset = limit + 1  # of no bucket: the first piece opens one
    for index, source, target in pieces:
        numel = prod(_shape(source))
        if offset + numel > limit:
            buckets.append([])
            offset = 0
        buckets[-1].append(Piece(index, source, target, offset))
        offset += numel
    return [Bucket(*route, tuple(bucket)) for bucket in buckets]


def _shape(box: Box) -> tuple[int, ...]:
    return tuple(side.stop - side.start for side in box)
