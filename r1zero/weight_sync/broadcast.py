"""Weight sync: broadcast the train ranks' parameters into the rollout engine, in place; or into the
reference.

What waits for what: a source packs a bucket and starts its broadcast; a receiver unpacks it when it
has landed. Every rank goes through the plan in the same order and waits only for its oldest
broadcast, so no ranks wait in a circle. Have all of them meet (on gloo) before `publish`: a device
collective must not be where they wait for each other.

In front of each bucket travels the version of its weights. So a receiver knows which it holds from
what it got, and not from what it was told.

Checksums go the way of the weights: a source sums up what it holds and broadcasts the sums, and each
receiver compares its own. Nobody needs all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist

from r1zero.models.layout import Index, WeightTarget
from r1zero.models.params import FIRST, ShardIndex, Shards, local_view
from r1zero.models.sizes import BUCKETS_IN_FLIGHT
from r1zero.weight_sync.bits import all_as_bits, as_bits
from r1zero.weight_sync.plan import Bucket, Piece, Plan, Route

# before a bucket's pieces: the version, int64, and nothing, so that they lie even
HEADER_BYTES = 64
CHUNK = 1 << 16  # elements that a checksum widens to 64 bits at a time
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size

# Megatron name with the global layer number -> this rank's parameter
LocalParameters = Mapping[str, torch.Tensor]


class Publisher:
    """One rank's part in publishing. All ranks of the world construct it and call its methods
    together."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        group_for: Callable[[tuple[int, ...]], dist.ProcessGroup | None],
        source: LocalParameters,
        target: WeightTarget,
        dtype: torch.dtype,
        device: torch.device | str,
        in_flight: int = BUCKETS_IN_FLIGHT,
    ) -> None:
        """Allocate the buckets and get the groups.

        Of the plan only this rank's part is kept. `group_for` is called for the groups that this
        rank is in; what order two of them come in is the same on all ranks. `source` has the
        tensors of train ranks, `target` those of ranks that receive; elsewhere they are empty. All hold
        `dtype`, or fp32 where the plan has their bits (bits.py). At most `in_flight` buckets are under
        way at a time.
        """
        self.plan = plan.part_of(rank)
        self.rank = rank
        self._held = Shards.of_grid(plan.train)
        self._needed = Shards.of_grid(plan.target)
        self._index = FIRST
        if rank in plan.target.ranks:
            self._index = ShardIndex.of_rank(plan.target, rank)
        self._dtype = dtype
        self._device = device
        self.source = source
        table = list(plan.tensors.values())
        self.target = replace(target, tensors=all_as_bits(target.tensors, table, dtype))
        in_fp32 = {spec.name for spec in table if spec.fp32}
        for name, param in (*source.items(), *self.target.tensors.items()):
            assert param.dtype == dtype or name in in_fp32, (
                f"{name} is {param.dtype}, but weights are published as {dtype}"
            )
        self._groups = {ranks: group_for(ranks) for ranks in self.plan.groups()}
        self._buckets = list(self.plan.buckets())
        # bytes that a publication writes to this rank's target: its shard's size
        self.received_bytes = self.plan.received(rank) * dtype.itemsize
        self._header = HEADER_BYTES // dtype.itemsize  # in elements
        self._versions: list[torch.Tensor] = []  # that came with the buckets of a publication
        sizes = [self._header + bucket.numel for bucket in self._buckets if not bucket.local]
        self._buffers = [
            torch.empty(max(sizes), dtype=dtype, device=device)
            for _ in range(min(in_flight, len(sizes)))
        ]

    @torch.no_grad()
    def publish(self, version: int) -> int | None:
        """Bring the target up to date with the source, whose weights are of this version there.

        Commits to the target the version that arrived, and returns it; None where nothing did, as
        on ranks without a target.
        """
        self._versions.clear()
        flying: deque[tuple[dist.Work, Bucket, torch.Tensor]] = deque()
        idle = deque(self._buffers)
        for bucket in self._buckets:
            if bucket.local:
                self._copy(bucket, version)
                continue
            if not idle:
                idle.append(self._land(*flying.popleft()))
            buffer = idle.popleft()
            flying.append((self._launch(bucket, buffer, version), bucket, buffer))
        while flying:
            self._land(*flying.popleft())
        if not self._versions:
            return None
        arrived = set(torch.stack(self._versions).tolist())
        assert len(arrived) == 1, (
            f"one publication brought weights of several versions: {sorted(arrived)}"
        )
        [version] = arrived
        self.target.commit(version)
        return version

    @torch.no_grad()
    def difference(self) -> tuple[int, str] | None:
        """Compare what this rank's target holds with what its sources hold now, by checksums that
        travel as the weights do. Collective, as `publish`.

        Returns the place in the parameter table of the first tensor that differs here, and a
        sentence about it; `collectives.first_finding` tells it to all ranks.
        """
        sent: dict[int, torch.Tensor] = {}
        received: dict[int, torch.Tensor] = {}
        # All sums before the first broadcast, so that ranks hardly wait for each other there.
        for number, route in enumerate(self.plan.routes):
            sent[number] = torch.zeros(len(route.cuts), dtype=torch.int64, device=self._device)
            if self.rank == route.source:
                sent[number] = self._sums(route, self._source_view)
            if self.rank in route.receivers:
                received[number] = self._sums(route, self._received)
        found = []
        for number, route in enumerate(self.plan.routes):
            if not route.local:
                dist.broadcast(sent[number], src=route.source, group=self._groups[route.ranks])
            if self.rank in route.receivers:
                found += self._first_difference(route, sent[number], received[number])
        return min(found, default=None)

    def _sums(self, route: Route, values_of: Callable[[Piece], torch.Tensor]) -> torch.Tensor:
        """The checksum of every piece of a route, int64 [pieces]."""
        return torch.stack([_checksum(values_of(piece)) for piece in route.pieces()])

    def _first_difference(
        self, route: Route, sent: torch.Tensor, received: torch.Tensor
    ) -> list[tuple[int, str]]:
        """What there is to say about the first piece whose sums differ, if there is one."""
        pairs = zip(route.tensors, sent.tolist(), received.tolist(), strict=True)
        for tensor, gave, got in pairs:
            if gave != got:
                sentence = (
                    f"after publishing, {self.plan.tensors[tensor].name} on {self.plan.target.role} "
                    f"rank {self.rank} differs from train rank {route.source}: it was corrupted on the "
                    "way or has changed since"
                )
                return [(tensor, sentence)]
        return []

    def _launch(self, bucket: Bucket, buffer: torch.Tensor, version: int) -> dist.Work:
        """Start a bucket's broadcast, packed first if this rank is its source."""
        if self.rank == bucket.source:
            _version_in(buffer).fill_(version)
            for piece, flat in _laid_out(bucket, buffer[self._header :]):
                flat.copy_(self._source_view(piece))
        return dist.broadcast(
            buffer[: self._header + bucket.numel],
            src=bucket.source,
            group=self._groups[bucket.ranks],
            async_op=True,
        )

    def _land(self, work: dist.Work, bucket: Bucket, buffer: torch.Tensor) -> torch.Tensor:
        """Finish a broadcast, unpack it if this rank is a receiver, and return the buffer for the
        next."""
        work.wait()
        if self.rank in bucket.receivers:
            self._versions.append(_version_in(buffer).clone())
            for piece, flat in _laid_out(bucket, buffer[self._header :]):
                self._write(piece, flat)
        return buffer

    def _copy(self, bucket: Bucket, version: int) -> None:
        """Copy a bucket that stays on this rank."""
        self._versions.append(torch.tensor(version, device=self._device))
        for piece in bucket.pieces:
            self._write(piece, self._source_view(piece))

    def _source_view(self, piece: Piece) -> torch.Tensor:
        tensor = self.plan.tensors[piece.tensor]
        param = as_bits(self.source[tensor.name], self._dtype)
        return local_view(tensor, param, self._held)[piece.source]

    def _write(self, piece: Piece, values: torch.Tensor) -> None:
        """Write a piece, of its shape, to where the target keeps it."""
        for index, place in self._places(piece):
            place.copy_(values[index])

    def _received(self, piece: Piece) -> torch.Tensor:
        """A piece as the target holds it, in the piece's shape."""
        values = torch.empty(piece.shape, dtype=self._dtype, device=self._device)
        for index, place in self._places(piece):
            values[index] = place
        return values

    def _places(self, piece: Piece) -> Iterator[tuple[Index, torch.Tensor]]:
        tensor = self.plan.tensors[piece.tensor]
        return self.target.regions(tensor, piece.target, self._needed, self._index)


def _version_in(buffer: torch.Tensor) -> torch.Tensor:
    """The place of the version in a buffer, an int64 scalar."""
    return buffer[: torch.int64.itemsize // buffer.itemsize].view(torch.int64)[0]


def _laid_out(bucket: Bucket, buffer: torch.Tensor) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Yield each piece with its part of the flat buffer, in the piece's shape."""
    for piece in bucket.pieces:
        yield piece, buffer[piece.offset : piece.offset + piece.numel].view(piece.shape)


def _checksum(values: torch.Tensor) -> torch.Tensor:
    """Sum the bits of each element times an odd weight of its position, modulo 2^64; return an
    int64 scalar.

    One changed element always changes the sum; so do all but a vanishing share of exchanged ones.
    """
    bits = values.reshape(-1).view(BITS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, len(bits), CHUNK):
        chunk = bits[start : start + CHUNK].long()
        weights = torch.arange(2 * start + 1, 2 * (start + len(chunk)) + 1, 2, device=values.device)
        total += (chunk * weights).sum()
    return total
