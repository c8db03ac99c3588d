"""The resharding plan of weight sync: who sends what to whom, computed alike everywhere.

Train ranks hold the model cut by TP and PP, in DP replicas; each rollout rank needs its TP shard. So
does each ref rank of its stage, when the reference is reset: all below that is said of rollout ranks
holds for the receivers of either role.
For every tensor the plan intersects what is held with what is needed:

    linear_proj columns      0        n/4       n/2      3n/4       n
    train TP 2               |------- t0 -------|------- t1 -------|
    rollout TP 4             |-- r0 --|-- r1 ---|-- r2 ---|-- r3 --|   t0 -> r0, t0 -> r1, t1 -> r2, t1 -> r3

A region goes along a route, from one source to the receivers that lack it. What goes along one route
fills flat buckets; a bucket is one broadcast. Each rollout rank receives every element of its shard
exactly once. A rank that holds what it needs copies it.

The whole plan is made everywhere, and a rank keeps its own part of it (`Plan.part_of`).

Pure arithmetic: no collectives, no tensors.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from math import lcm, prod

from r1zero.distributed.placement import RankGrid
from r1zero.models.layout import Box
from r1zero.models.params import ParamSpec, Shards, Stages, local_shape, stage_of

# Replicas of train that send. Each source is one more process group, with buffers on the device, of
# every rank that receives from it, so they must not grow with the world. Nor need they: a receiver
# takes in its whole shard, a source gives away its stage's part of one or a few. The second is for
# train PP 1, where source and receiver have as much to do, and for a slow link.
SENDING_REPLICAS = 2


@dataclass(frozen=True, slots=True)
class Cut:
    """A region of a tensor, or a part of one that fits a bucket. Tensors of one shape share it."""

    source: Box  # in the local view of the source's parameter
    target: Box  # in the local view of each receiver's parameter
    numel: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A region of one tensor, and its place in the bucket that carries it."""

    tensor: int  # key of Plan.tensors
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
        last = self.pieces[-1]
        return last.offset + last.numel

    @property
    def local(self) -> bool:
        return self.receivers == (self.source,)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The members of its broadcast, in ascending order."""
        return tuple(sorted({self.source, *self.receivers}))


@dataclass(slots=True)
class Route:
    """All that goes from one source to the same receivers: cuts of tensors, in order.

    A million of them are no burden: 12 bytes each, and pieces are made when they are asked for.
    """

    source: int  # global rank, as the receivers
    receivers: tuple[int, ...]
    bucket_elements: int  # that a bucket holds at most
    tensors: array[int] = field(default_factory=lambda: array("i"))
    cuts: list[Cut] = field(default_factory=list)

    def add(self, tensor: int, cut: Cut) -> None:
        self.tensors.append(tensor)
        self.cuts.append(cut)

    @property
    def numel(self) -> int:
        return sum(cut.numel for cut in self.cuts)

    @property
    def local(self) -> bool:
        return self.receivers == (self.source,)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The members of its process group, in ascending order."""
        return tuple(sorted({self.source, *self.receivers}))

    def pieces(self) -> Iterator[Piece]:
        """Lay all of it into buckets, in order: a piece that does not fit opens the next.

        >>> route = Route(source=0, receivers=(8,), bucket_elements=10)
        >>> for tensor, size in enumerate((5, 4, 3)):
        ...     route.add(tensor, Cut((slice(0, size),), (slice(0, size),), size))
        >>> [piece.offset for piece in route.pieces()]
        [0, 5, 0]
        """
        offset = 0
        for tensor, cut in zip(self.tensors, self.cuts, strict=True):
            if offset + cut.numel > self.bucket_elements:
                offset = 0
            yield Piece(tensor, cut.source, cut.target, offset)
            offset += cut.numel

    def buckets(self) -> Iterator[Bucket]:
        """The broadcasts of this route, or copies."""
        pieces: list[Piece] = []
        for piece in self.pieces():
            if pieces and piece.offset == 0:
                yield Bucket(self.source, self.receivers, tuple(pieces))
                pieces = []
            pieces.append(piece)
        yield Bucket(self.source, self.receivers, tuple(pieces))


@dataclass(frozen=True, slots=True)
class Plan:
    """A publication, whole or as one rank has part in it."""

    tensors: Mapping[int, ParamSpec]  # by place in the parameter table
    train: Shards  # into how many parts the sources cut the tensors
    target: Shards  # and the receivers
    target_role: str  # rollout or ref
    routes: tuple[Route, ...]

    def part_of(self, rank: int) -> Plan:
        """What this rank gives, gets and copies, in the order of the whole."""
        routes = tuple(
            route for route in self.routes if rank == route.source or rank in route.receivers
        )
        used: set[int] = set()
        for route in routes:
            used.update(route.tensors)
        tensors = {number: self.tensors[number] for number in sorted(used)}
        return replace(self, tensors=tensors, routes=routes)

    def buckets(self) -> Iterator[Bucket]:
        """Yield the buckets in the order in which ranks go through them.

        The routes take turns: with several buckets in flight, several sources send at a time. A
        rank's part has its buckets in the order of the whole, so ranks never wait in a circle:

            routes a, b, c of 2, 1, 3 buckets    a0 b0 c0 a1 c1 c2
            the part with a and c                a0    c0 a1 c1 c2
        """
        for turn in zip_longest(*(route.buckets() for route in self.routes)):
            for bucket in turn:
                if bucket is not None:
                    yield bucket

    def groups(self) -> list[tuple[int, ...]]:
        """List the rank sets that need a process group, once each, in the order of the whole."""
        return list(dict.fromkeys(route.ranks for route in self.routes if not route.local))

    def received(self, rank: int) -> int:
        """Count the elements that a publication puts into the weights of a rank that receives."""
        return sum(route.numel for route in self.routes if rank in route.receivers)

    def sent(self, rank: int) -> int:
        """Count the elements that a rank broadcasts, each once however many receive it."""
        return sum(route.numel for route in self.routes if rank == route.source and not route.local)


def plan(
    tensors: Sequence[ParamSpec],
    num_layers: int,
    train: RankGrid,
    target: RankGrid,
    element_size: int,
    bucket_bytes: int,
    senders: int = SENDING_REPLICAS,
) -> Plan:
    """Lay out the publication of `tensors` (all of one dtype) to the ranks of `target`, in
    broadcasts of at most `bucket_bytes`.

    Up to `senders` replicas take turns as sources, the one that has sent least first.
    BadInput when TP does not divide a tensor or PP the layers.
    """
    limit = bucket_bytes // element_size
    assert limit > 0, f"a bucket of {bucket_bytes} bytes holds no element"
    planner = _Planner(train, target, limit, senders)
    train_stages = Stages.of(num_layers, train)
    target_stages = Stages.of(num_layers, target)
    for number, tensor in enumerate(tensors):
        held = stage_of(tensor, train_stages)
        needed = stage_of(tensor, target_stages)
        planner.add(number, tensor, held, needed)
    routes = tuple(planner.routes.values())
    return Plan(
        dict(enumerate(tensors)),
        Shards.of_grid(train),
        Shards.of_grid(target),
        target.role,
        routes,
    )


@dataclass(frozen=True, slots=True)
class _Move:
    """How one region gets to the receivers of a TP index, for all tensors of one shape on one stage
    of either side."""

    cuts: list[Cut]
    copying: list[int]  # receivers that hold it
    receivers: tuple[int, ...]  # that do not
    sources: list[int]  # which of them sends is decided cut by cut; ascending
    routes: dict[int, Route] = field(default_factory=dict)  # to the receivers, by source


class _Planner:
    """Gathers the routes of a plan, tensor by tensor."""

    def __init__(self, train: RankGrid, target: RankGrid, limit: int, senders: int) -> None:
        self.routes: dict[tuple[int, tuple[int, ...]], Route] = {}
        self._limit = limit
        self._train_tp = train.tp
        self._holders = _replica_lines(train)
        self._sending = _apart(train.dp, senders)
        self._target_tp = target.tp
        self._needing = _replica_lines(target)
        self._sent = dict.fromkeys(train.ranks, 0)
        self._moves: dict[tuple[tuple[int, ...], int | None, int, int], list[_Move]] = {}

    def add(self, number: int, tensor: ParamSpec, held: int, needed: int) -> None:
        """Take in a tensor that the ranks of stage `held` of train hold, and those of stage `needed`
        of the target need."""
        alike = (tensor.view, tensor.axis, held, needed)
        if alike not in self._moves:
            self._moves[alike] = list(self._moves_of(tensor, held, needed))
        for move in self._moves[alike]:
            for cut in move.cuts:
                for rank in move.copying:
                    self._route(rank, (rank,)).add(number, cut)
                if move.receivers:
                    self._send(move, number, cut)

    def _send(self, move: _Move, number: int, cut: Cut) -> None:
        """Let the source send that has sent least; of several the lowest."""
        source = min(move.sources, key=self._sent.__getitem__)
        self._sent[source] += cut.numel
        if source not in move.routes:
            move.routes[source] = self._route(source, move.receivers)
        move.routes[source].add(number, cut)

    def _moves_of(self, tensor: ParamSpec, stage: int, needed: int) -> Iterator[_Move]:
        for needy in range(self._target_tp):
            needing = self._needing[needy, needed]
            regions = _overlaps(tensor, self._train_tp, self._target_tp, needy)
            for holders, senders, source, target in regions:
                held = self._ranks_at(holders, stage)
                yield _Move(
                    _cuts(source, target, self._limit),
                    [rank for rank in needing if rank in held],
                    tuple(rank for rank in needing if rank not in held),
                    self._sources_at(senders, stage),
                )

    def _ranks_at(self, tps: Sequence[int], stage: int) -> set[int]:
        """Ranks of every replica."""
        found: set[int] = set()
        for tp in tps:
            found.update(self._holders[tp, stage])
        return found

    def _sources_at(self, tps: Sequence[int], stage: int) -> list[int]:
        """Ranks of the replicas that send, ascending."""
        found = []
        for tp in tps:
            line = self._holders[tp, stage]
            found += [line[replica] for replica in self._sending]
        return sorted(found)

    def _route(self, source: int, receivers: tuple[int, ...]) -> Route:
        key = (source, receivers)
        if key not in self.routes:
            self.routes[key] = Route(source, receivers, self._limit)
        return self.routes[key]


def _replica_lines(grid: RankGrid) -> dict[tuple[int, int], list[int]]:
    """By TP index and stage: the ranks there, one of each replica."""
    lines = {}
    for stage in range(grid.pp):
        for tp in range(grid.tp):
            lines[tp, stage] = [
                grid.rank_at(tp=tp, dp=replica, pp=stage) for replica in range(grid.dp)
            ]
    return lines


def _apart(replicas: int, most: int) -> list[int]:
    """Choose replicas that lie far apart, so that they do not share a node's links.

    >>> _apart(8, most=2), _apart(2, most=2), _apart(1, most=2)
    ([0, 4], [0, 1], [0])
    """
    count = min(replicas, most)
    return [number * replicas // count for number in range(count)]


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
    local_shape(tensor, Shards(train_tp)), local_shape(tensor, Shards(rollout_tp))
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


def _cuts(source: Box, target: Box, limit: int) -> list[Cut]:
    """Cut a region, as source and receivers see it, into parts of at most `limit` elements."""
    parts = zip(_cut(source, limit), _cut(target, limit), strict=True)
    return [Cut(held, needed, prod(_shape(held))) for held, needed in parts]


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


def _shape(box: Box) -> tuple[int, ...]:
    return tuple(side.stop - side.start for side in box)
