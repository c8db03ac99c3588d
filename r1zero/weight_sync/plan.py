"""The resharding plan of weight sync: who sends what to whom, computed alike everywhere.

Train ranks hold the model cut by TP and PP, experts by EP, in DP replicas; each rollout rank needs its
shard. So does each ref rank of its stage, when the reference is reset: all below that is said of
rollout ranks holds for the receivers of either role.
For every tensor the plan intersects what is held with what is needed:

    linear_proj columns      0        n/4       n/2      3n/4       n
    train TP 2               |------- t0 -------|------- t1 -------|
    rollout TP 4             |-- r0 --|-- r1 ---|-- r2 ---|-- r3 --|   t0 -> r0, t0 -> r1, t1 -> r2, t1 -> r3

A region goes along a route, from one source to the receivers that lack it. What goes along one route
fills flat buckets; a bucket is one broadcast. Each rollout rank receives every element of its shard
exactly once. A rank that holds what it needs copies it.

Experts are cut along their own axis: of 8, train EP 4, rollout TP 2, whose ranks hold whole experts:

    experts                  0    1    2    3    4    5    6    7
    train EP 4               |-- e0 --|-- e1 --|-- e2 --|-- e3 --|
    rollout                  |------- r0 ------|------- r1 ------|   e0 -> r0, e1 -> r0, e2 -> r1, e3 -> r1

Every source is one more process group of its receivers. Of a model without experts two replicas send
in turn. Of one with experts, which lie on many ranks, each part has one source, and what EP does not
cut comes from a rank that sends experts to the same receivers, where there is one. Receivers that
still have many sources get groups with several of them: see `_share_groups`.

The whole plan is made everywhere, and a rank keeps its own part of it (`Plan.part_of`).

Pure arithmetic: no collectives, no tensors.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from math import prod

from r1zero.distributed.placement import RankGrid
from r1zero.models.layout import Box
from r1zero.models.params import CutAxis, ParamSpec, ShardIndex, Shards, Stages, stage_of
from r1zero.weight_sync.overlap import Cut, fitting_cuts, num_parts, overlaps, partners, shape_of

# Replicas of train that send. Each source is one more process group, with buffers on the device, of
# every rank that receives from it, so they must not grow with the world. Nor need they: a receiver
# takes in its whole shard, a source gives away its stage's part of one or a few. The second is for
# train PP 1, where source and receiver have as much to do, and for a slow link.
SENDING_REPLICAS = 2
# Groups of publishing in which a rank receives, at most; each takes two buffers of device memory. A
# model of 8 stages whose experts lie on 16 ranks of each has 32 sources for a rollout rank of TP 4.
GROUPS_OF_A_RECEIVER = 16


@dataclass(frozen=True, slots=True)
class Piece:
    """A region of one tensor, and its place in the bucket that carries it."""

    tensor: int  # key of Plan.tensors
    source: Box  # in the local view of the source's parameter
    target: Box  # in the local view of each receiver's parameter
    offset: int  # in the bucket, in elements

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.source)

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Pieces that travel together in one broadcast, or stay on a rank that is source and
    receiver."""

    source: int
    receivers: tuple[int, ...]
    ranks: tuple[int, ...]  # the members of its broadcast, in ascending order
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        last = self.pieces[-1]
        return last.offset + last.numel

    @property
    def local(self) -> bool:
        return self.receivers == (self.source,)


@dataclass(slots=True)
class Route:
    """All that goes from one source to the same receivers: cuts of tensors, in order.

    A million of them are no burden: 12 bytes each, and pieces are made when they are asked for.
    """

    source: int  # global rank, as the receivers
    receivers: tuple[int, ...]
    bucket_elements: int  # that a bucket holds at most
    # The members of its process group, ascending: these and whoever shares the group.
    ranks: tuple[int, ...] = ()
    tensors: array[int] = field(default_factory=lambda: array("i"))
    cuts: list[Cut] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ranks = tuple(sorted({self.source, *self.receivers}))

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
    def listeners(self) -> list[int]:
        """Members of its process group for whom nothing is in it."""
        return [rank for rank in self.ranks if rank not in (self.source, *self.receivers)]

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
                yield Bucket(self.source, self.receivers, self.ranks, tuple(pieces))
                pieces = []
            pieces.append(piece)
        yield Bucket(self.source, self.receivers, self.ranks, tuple(pieces))


@dataclass(frozen=True, slots=True)
class Plan:
    """A publication, whole or as one rank has part in it."""

    tensors: Mapping[int, ParamSpec]  # by place in the parameter table
    train: RankGrid
    target: RankGrid  # of rollout or ref
    routes: tuple[Route, ...]

    def part_of(self, rank: int) -> Plan:
        """What this rank gives, gets, copies and listens to, in the order of the whole."""
        routes = tuple(route for route in self.routes if rank in route.ranks)
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

    Of a model without experts up to `senders` replicas take turns as sources, the one that has sent
    least first. BadInput when TP or EP does not divide a tensor, or the layers cannot be spread over
    the stages.
    """
    limit = bucket_bytes // element_size
    assert limit > 0, f"a bucket of {bucket_bytes} bytes holds no element"
    has_experts = any(tensor.cut == "experts" for tensor in tensors)
    planner = _Planner(train, target, limit, None if has_experts else senders)
    train_stages = Stages.of(num_layers, train)
    target_stages = Stages.of(num_layers, target)
    for number, tensor in enumerate(tensors):
        held = stage_of(tensor, train_stages)
        needed = stage_of(tensor, target_stages)
        planner.add(number, tensor, held, needed)
    for line in planner.lines.values():
        _share_groups(list(line.values()))
    routes = tuple(planner.routes.values())
    return Plan(dict(enumerate(tensors)), train, target, routes)


@dataclass(frozen=True, slots=True)
class _Move:
    """How one region gets to those who need it, for all tensors of one shape on one stage of either
    side."""

    cuts: list[Cut]
    line: tuple[int, ...]  # the ranks that need it
    copying: list[int]  # those of them that hold it
    receivers: tuple[int, ...]  # that do not
    sources: list[int]  # which of them sends is decided cut by cut; ascending
    routes: dict[int, Route] = field(default_factory=dict)  # to the receivers, by source


class _Planner:
    """Gathers the routes of a plan, tensor by tensor."""

    def __init__(self, train: RankGrid, target: RankGrid, limit: int, senders: int | None) -> None:
        """`senders` replicas send; None: one source for each part of a model with experts."""
        self.routes: dict[tuple[int, tuple[int, ...]], Route] = {}
        # those on which something is received, by the ranks that need it
        self.lines: dict[tuple[int, ...], dict[tuple[int, tuple[int, ...]], Route]] = {}
        self._limit = limit
        self._senders = senders
        self._train = Shards.of_grid(train)
        self._holding = _lines(train)
        self._target = Shards.of_grid(target)
        self._needing = _lines(target)
        self._sent = dict.fromkeys(train.ranks, 0)
        self._moves: dict[Hashable, list[_Move]] = {}

    def add(self, number: int, tensor: ParamSpec, held: int, needed: int) -> None:
        """Take in a tensor that the ranks of stage `held` of train hold, and those of stage `needed`
        of the target need."""
        alike = (tensor.view, tensor.axis, tensor.cut, held, needed)
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
            route = self._route(source, move.receivers)
            move.routes[source] = route
            self.lines.setdefault(move.line, {})[source, move.receivers] = route
        move.routes[source].add(number, cut)

    def _moves_of(self, tensor: ParamSpec, stage: int, needed: int) -> Iterator[_Move]:
        for needy in range(num_parts(self._target, tensor.cut)):
            needing = self._needing[tensor.cut, needy, needed]
            for overlap in overlaps(tensor, self._train, self._target, needy):
                held = set()
                for part in overlap.holders:
                    held.update(self._holding[tensor.cut, part, stage])
                yield _Move(
                    fitting_cuts(overlap.source, overlap.target, self._limit),
                    tuple(needing),
                    [rank for rank in needing if rank in held],
                    tuple(rank for rank in needing if rank not in held),
                    self._sources(tensor.cut, overlap.senders, stage, needy),
                )

    def _sources(self, cut: CutAxis, parts: Sequence[int], stage: int, needy: int) -> list[int]:
        """Ranks that may send these parts to the receivers of a needed part, ascending."""
        lines = [self._holding[cut, part, stage] for part in parts]
        if self._senders is not None:
            chosen = []
            for line in lines:
                chosen += [line[place] for place in _apart(len(line), self._senders)]
            return sorted(chosen)
        if cut == "tp":
            experts = self._expert_sources(stage, needy)
            riding = sorted(rank for line in lines for rank in line if rank in experts)
            if riding:
                return riding
        return sorted(_in_turn(line, needy) for line in lines)

    def _expert_sources(self, stage: int, needy: int) -> set[int]:
        """The ranks of a stage that send experts to those who need this part of what TP cuts."""
        if self._target.ep != self._target.tp:
            return set()  # they do not need the same experts
        found = set()
        for part in partners(self._train.ep, self._target.ep, needy):
            line = self._holding["experts", part, stage]
            found.add(_in_turn(line, needy))
        return found

    def _route(self, source: int, receivers: tuple[int, ...]) -> Route:
        key = (source, receivers)
        if key not in self.routes:
            self.routes[key] = Route(source, receivers, self._limit)
        return self.routes[key]


def _lines(grid: RankGrid) -> dict[tuple[CutAxis, int, int], list[int]]:
    """By what cuts a parameter, its part, and stage: the ranks that hold this part, ascending."""
    lines: dict[tuple[CutAxis, int, int], list[int]] = {}
    for rank in grid.ranks:
        stage = grid.index_of(rank).get("pp", 0)
        index = ShardIndex.of_rank(grid, rank)
        lines.setdefault(("tp", index.tp, stage), []).append(rank)
        lines.setdefault(("experts", index.ep, stage), []).append(rank)
    return lines


def _in_turn(line: Sequence[int], needy: int) -> int:
    """The one rank of a line that sends to those who need part `needy`: its replicas take turns.

    Train ranks 0, 4 and 8 hold the same part, and rollout TP 4 needs it in four:

    >>> [_in_turn([0, 4, 8], needy) for needy in range(4)]
    [0, 4, 8, 0]
    """
    return line[needy % len(line)]


def _share_groups(routes: Sequence[Route]) -> None:
    """Where receivers have more groups than they should, let neighbouring sources share one.

    `routes` are those to one line of receivers. All members of a group hear a broadcast in it, so a
    source hears what its neighbours in the group send. These are of the same stage, mostly, and on
    the same node; where two share, each hears as much as it sends. Sources 0 to 31 to the receivers
    128, 132, ... make 16 groups, 0 1 128 132 ..., 2 3 128 132 ..., instead of 32.
    """
    if len({route.ranks for route in routes}) <= GROUPS_OF_A_RECEIVER:
        return
    sources = sorted({route.source for route in routes})
    for number in range(GROUPS_OF_A_RECEIVER):
        first = number * len(sources) // GROUPS_OF_A_RECEIVER
        stop = (number + 1) * len(sources) // GROUPS_OF_A_RECEIVER
        together = [route for route in routes if route.source in sources[first:stop]]
        members: set[int] = set()
        for route in together:
            members.update(route.ranks)
        for route in together:
            route.ranks = tuple(sorted(members))


def _apart(replicas: int, most: int) -> list[int]:
    """Choose replicas that lie far apart, so that they do not share a node's links.

    >>> _apart(8, most=2), _apart(2, most=2), _apart(1, most=2)
    ([0, 4], [0, 1], [0])
    """
    count = min(replicas, most)
    return [number * replicas // count for number in range(count)]
