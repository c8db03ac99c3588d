"""Transfer of samples between roles: broadcast, gather, send and receive on the control plane.

A move is an asynchronous send for the giver and a blocking receive for the taker. That alone makes
the pipeline: rollout ranks hand over a minibatch and go on decoding, while the ranks that wait for
it wake up.

Samples and routes travel as flat buffers (distributed/wire.py, route_wire.py), everything else as
pickled objects. What goes to the replicas of a role is a stream of its own: ranks may be far ahead of each other, and a sample
of the next batch that is on its way must not stand between two ranks that gather records.
"""

from __future__ import annotations

import pickle
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from r1zero.distributed import collectives, route_wire, wire
from r1zero.distributed.groups import Grid, World
from r1zero.types import Batch, Group, RecordedRoutes, Sample

# Tags beside that of control messages: of values that output ranks join, on their way to the first
# of them, back, and on to the next role; of routes; of values of positions; then of samples, one for
# each role that takes them.
UPWARD = 1
DOWNWARD = 2
ONWARD = 3
ROUTES = 4
VALUES = 5
FIRST_OF_ROLES = 6

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(slots=True)
class Traffic:
    """Bytes of samples and their routes that a rank sent to others and received from them.

    What it tells the other ranks of its replica is not counted, what they hear of it is.
    """

    sent: int = 0
    received: int = 0


class RoleTransfer:
    """The moves of one rank. Sends stay pending until `flush`."""

    def __init__(self, world: World) -> None:
        self.world = world
        # by the step that needs them
        self._pending: defaultdict[int, list[tuple[dist.Work, torch.Tensor]]] = defaultdict(list)
        # by their tag
        self._to_myself: defaultdict[int, deque[bytes]] = defaultdict(deque)
        self._samples_to_myself: defaultdict[int, deque[torch.Tensor]] = defaultdict(deque)
        self.traffic = Traffic()

    def from_controller(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` on the controller and give its value to every rank."""
        value = self.at_controller(function, *args, **kwargs)
        return collectives.broadcast_object(value, 0, self.world.control)

    def at_controller(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T | None:
        """Call `function` on the controller; None elsewhere."""
        if self.world.is_controller:
            return function(*args, **kwargs)
        return None

    def share_batch(
        self, batch: Batch | None, share: Callable[[int], Iterable[int]] | None = None
    ) -> Batch:
        """Give the controller's batch to every rank.

        Data rows of its prompts, which may be large, go only to the ranks that score: to the output
        rank of a rollout replica those at the positions `share(replica)`, by default as
        `Grid.share` says. Everywhere else they are None.
        """
        scoring = self.world.rollout
        plan = None
        if batch is not None:
            plan = (batch.with_rows({}), any(prompt.row is not None for prompt in batch.prompts))
        shared, has_rows = collectives.broadcast_object(plan, 0, self.world.control)
        if not has_rows:
            return shared
        if batch is not None:
            for replica in range(scoring.span.dp):
                mine = share(replica) if share else scoring.span.share(replica, batch.positions)
                rows = {position: batch.prompts[position].row for position in mine}
                self._send(rows, scoring.span.output_rank(replica))
        if scoring.is_output_rank:
            return shared.with_rows(self._receive(0))
        return shared

    def send_to_replicas(
        self, batch: Batch, groups: list[Group], positions: range, giver: Grid, taker: Grid
    ) -> list[Group]:
        """Move the samples of groups at these batch positions from one role to the replicas of
        another.

        A position lives on one replica of either role (RankGrid.replica_of). The giver's output
        ranks send; the taker's input ranks receive and tell their replica. From DP 2 to DP 3, the
        positions 0 to 5:

            rollout replica 0   holds 0 2 4    sends 0 to ref 0, 4 to ref 1, 2 to ref 2
            rollout replica 1   holds 1 3 5    sends 3 to ref 0, 1 to ref 1, 5 to ref 2

        so ref replica 0 waits for both, the lower rank first, and has 0 3; 1 has 1 4, 2 has 2 5.
        Not all positions need to have a group: a sender whose groups are all missing sends an empty
        list, since only it knows that. Returns the taker's groups in order, none elsewhere; they
        have the prompts of the batch, and no scores. From a role to itself nothing moves.
        """
        if taker is giver:
            return groups
        tag = self._tag(taker)
        if giver.is_output_rank:
            for replica in range(taker.span.dp):
                share = [
                    group for group in groups if taker.span.replica_of(group.position) == replica
                ]
                if self.world.rank in _senders(giver, taker.span.share(replica, positions)):
                    self._send_samples(
                        wire.pack(share), taker.span.input_rank(replica), tag, batch.step
                    )
                else:
                    assert not share, "groups at other positions than these"
        if not taker.member:
            return []
        arrived: list[Group] = []
        for sender in _senders(giver, taker.span.share(taker.replica, positions)):
            buffer = None
            if taker.is_input_rank:
                buffer = self._receive_samples(sender, tag)
            arrived += wire.unpack(self._tell_replica(buffer, taker), batch.prompts)
        return sorted(arrived, key=lambda group: group.position)

    def send_samples(
        self, batch: Batch, samples: Mapping[int, Sample], rank: int, taker: Grid
    ) -> None:
        """Send samples of a batch, by their numbers, to an input rank of the taking role."""
        self._send_samples(wire.pack_samples(samples), rank, self._tag(taker), batch.step)

    def receive_samples(self, senders: Sequence[int], taker: Grid) -> dict[int, Sample]:
        """Take what these ranks send to this rank's replica, on all its ranks."""
        found: dict[int, Sample] = {}
        for sender in senders:
            buffer = None
            if taker.is_input_rank:
                buffer = self._receive_samples(sender, self._tag(taker))
            found |= wire.unpack_samples(self._tell_replica(buffer, taker))
        return found

    def send_routes(self, batch: Batch, routes: RecordedRoutes, rank: int) -> None:
        """Send routes of a batch to an input rank of the role that trains."""
        self._send_samples(route_wire.pack_routes(routes), rank, ROUTES, batch.step)

    def receive_routes(self, senders: Sequence[int], taker: Grid) -> RecordedRoutes:
        """Take what these ranks send to this rank's replica, on all its ranks."""
        found = RecordedRoutes()
        for sender in senders:
            buffer = None
            if taker.is_input_rank:
                buffer = self._receive_samples(sender, ROUTES)
            found.add(route_wire.unpack_routes(self._tell_replica(buffer, taker)))
        return found

    def send_values(
        self, batch: Batch, values: Mapping[int, T], positions: range, giver: Grid, taker: Grid
    ) -> None:
        """Send a value of each of some positions, on the output rank of the replica of `giver` that has
        them, to the output ranks of the replicas of `taker` on which these positions live.

        Not all positions need to have a value; `receive_values` takes them.
        """
        for replica in range(taker.span.dp):
            share = taker.span.share(replica, positions)
            if self.world.rank not in _senders(giver, share):
                continue
            mine = {position: values[position] for position in share if position in values}
            self._send(mine, taker.span.output_rank(replica), batch.step, VALUES)

    def receive_values(self, positions: range, giver: Grid, taker: Grid) -> dict[int, Any]:
        """Take what `send_values` sent of these positions to this rank, an output rank of `taker`."""
        found: dict[int, Any] = {}
        for sender in _senders(giver, taker.span.share(taker.replica, positions)):
            found |= self._receive(sender, VALUES)
        return found

    def join_outputs(
        self,
        value: T,
        join: Callable[[list[T]], T],
        batch: Batch,
        giver: Grid,
        taker: Grid | None = None,
    ) -> T:
        """Join a value of every output rank of a role, in order of their replicas.

        All of them must come. Returns it there; `receive_joined` takes it on the taker's ranks, if
        there is one.
        """
        ranks = [giver.span.output_rank(replica) for replica in range(giver.span.dp)]
        leader = ranks[0]
        if self.world.rank != leader:
            self._send(value, leader, batch.step, UPWARD)
            return self._receive(leader, DOWNWARD)
        joined = join([value, *(self._receive(rank, UPWARD) for rank in ranks[1:])])
        for rank in ranks[1:]:
            self._send(joined, rank, batch.step, DOWNWARD)
        if taker is not None:
            self._send(joined, taker.span.first, batch.step, ONWARD)
        return joined

    def receive_joined(self, giver: Grid, taker: Grid) -> Any:
        """Take what `join_outputs` joined, on every rank of the taking role."""
        assert taker.role_control is not None
        joined = None
        if self.world.rank == taker.span.first:
            joined = self._receive(giver.span.output_rank(0), ONWARD)
        return collectives.broadcast_object(joined, taker.span.first, taker.role_control)

    def all_gather(self, value: T) -> list[T]:
        """Collect one value from every rank, in rank order, on every rank."""
        return collectives.broadcast_object(self.to_controller(value), 0, self.world.control)

    def to_controller(self, value: T) -> list[T]:
        """Collect one value from every rank, in rank order, on the controller; [] elsewhere."""
        return collectives.gather_objects(value, self.world.control) or []

    def flush(self, step: int) -> None:
        """Wait until everything sent for this step has been taken, and until all ranks have come this
        far. Samples of later steps may stay on their way."""
        for of_step in [number for number in self._pending if number <= step]:
            for work, _ in self._pending.pop(of_step):
                work.wait()
        self.world.barrier()

    def _send(
        self, value: object, rank: int, step: int = 0, tag: int = collectives.CONTROL
    ) -> None:
        if rank == self.world.rank:
            pickled = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
            self._to_myself[tag].append(pickled)
        else:
            self._pending[step] += collectives.isend_object(value, rank, self.world.control, tag)

    def _receive(self, rank: int, tag: int = collectives.CONTROL) -> Any:
        if rank == self.world.rank:
            return pickle.loads(self._to_myself[tag].popleft())
        return collectives.recv_object(rank, self.world.control, tag)

    def _tag(self, taker: Grid) -> int:
        """Of the samples that go to the replicas of a role."""
        return FIRST_OF_ROLES + list(self.world.roles).index(taker.span.role)

    def _send_samples(self, buffer: torch.Tensor, rank: int, tag: int, step: int) -> None:
        if rank == self.world.rank:
            self._samples_to_myself[tag].append(buffer)
        else:
            self._pending[step] += collectives.isend_bytes(buffer, rank, self.world.control, tag)
            self.traffic.sent += buffer.numel()

    def _receive_samples(self, rank: int, tag: int) -> torch.Tensor:
        if rank == self.world.rank:
            return self._samples_to_myself[tag].popleft()
        buffer = collectives.recv_bytes(rank, self.world.control, tag)
        self.traffic.received += buffer.numel()
        return buffer

    def _tell_replica(self, buffer: torch.Tensor | None, grid: Grid) -> torch.Tensor:
        """Give what the input rank of a replica holds to all its ranks."""
        assert grid.replica_control is not None
        leader = grid.span.input_rank(grid.replica)
        told = collectives.broadcast_bytes(buffer, leader, grid.replica_control)
        if buffer is None:
            self.traffic.received += told.numel()
        return told


def _senders(giver: Grid, positions: range) -> list[int]:
    """The ranks of a role that send the groups at these positions, in ascending order."""
    span = giver.span
    return sorted({span.output_rank(span.replica_of(position)) for position in positions})
