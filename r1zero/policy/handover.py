"""The way of samples from the ref ranks to the train ranks: each goes to one replica, once.
Without a reference it begins at the rollout ranks (`World.giver`).

    ref output ranks    tables of their groups -> the first of them, which joins them and tells all
    first of them       the joined table       -> the first train rank, which tells all train ranks
    ref output ranks    samples                -> the input rank of the replica that learns from them,
                                                  which tells its replica

Lengths decide who learns from what (algo/dealing.py), and both sides know them from the same table.
All sends are asynchronous: ref ranks go on with the next part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from r1zero.algo.dealing import Deal, Dealer, SampleTable
from r1zero.distributed.groups import Grid
from r1zero.distributed.transfer import RoleTransfer
from r1zero.types import Batch, Drawn, Group, Sample


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a train rank learns from at a time."""

    deal: Deal
    samples: Mapping[int, Sample]  # its replica's share, by number
    # By position: the routes of their prompts, if the batch keeps routes.
    prompt_routes: dict[int, np.ndarray] = field(default_factory=dict)

    def forget_routes(self) -> None:
        """Free the memory of the routes: nobody learns from them once more."""
        self.prompt_routes.clear()
        for sample in self.samples.values():
            sample.routes = None


class Giver:
    """The end at the giving ranks, for one global batch. Does nothing but on output ranks."""

    def __init__(self, move: RoleTransfer, batch: Batch, giver: Grid, taker: Grid) -> None:
        self._move = move
        self._batch = batch
        self._giver = giver
        self._taker = taker
        self._dealer = Dealer(batch, taker.span.dp)
        self._held: dict[int, Sample] = {}

    def go_on(self, batch: Batch) -> None:
        """Take the plan of another round of the batch."""
        self._batch = batch
        self._dealer.go_on(batch)

    def give(self, groups: list[Group]) -> None:
        """Send what can be learned from now that these groups, of the next part, are there."""
        if not self._giver.is_output_rank:
            return
        size = self._batch.samples_per_prompt
        for group in groups:
            for member, sample in enumerate(group.samples):
                if not (group.trains and sample.trains):
                    continue
                self._held[group.position * size + member] = sample
        table = self._move.join_outputs(
            SampleTable.of(groups, size), SampleTable.join, self._batch, self._giver, self._taker
        )
        for deal in self._dealer.add(table):
            for replica, numbers in enumerate(deal.shares):
                mine = {n: self._held.pop(n) for n in numbers if n in self._held}
                if mine:
                    receiver = self._taker.span.input_rank(replica)
                    self._move.send_samples(self._batch, mine, receiver, self._taker)


class Taker:
    """The end at the train ranks, for one global batch. Takes nothing on other ranks."""

    def __init__(
        self, move: RoleTransfer, batch: Batch, giver: Grid, taker: Grid, rollout: Grid
    ) -> None:
        """If the batch keeps routes, they are taken from `rollout` (route_handover.py)."""
        self._move = move
        self._batch = batch
        self._giver = giver
        self._taker = taker
        self._rollout = rollout
        self._dealer = Dealer(batch, taker.span.dp)

    def go_on(self, batch: Batch) -> None:
        """Take the plan of another round of the batch."""
        self._batch = batch
        self._dealer.go_on(batch)

    @property
    def known(self) -> SampleTable:
        """All groups that have come, by position; none on other ranks."""
        return self._dealer.known

    @property
    def drawn(self) -> Drawn:
        """How many groups have come."""
        return Drawn(self._batch.fresh, len(self.known.positions), int(self.known.kept.sum()))

    def take(self) -> list[Delivery]:
        """Wait for the next part; returns what can be learned from now, in order."""
        if not self._taker.member:
            return []
        table = self._move.receive_joined(self._giver, self._taker)
        return [self._delivery(deal) for deal in self._dealer.add(table)]

    def _delivery(self, deal: Deal) -> Delivery:
        """This replica's share of a deal."""
        numbers = deal.shares[self._taker.replica]
        samples = self._move.receive_samples(self._senders(self._giver, numbers), self._taker)
        if not self._batch.keeps_routes:
            return Delivery(deal, samples)
        senders = self._senders(self._rollout, numbers)
        routes = self._move.receive_routes(senders, self._taker)
        for number, ids in routes.samples.items():
            samples[number].routes = ids
        return Delivery(deal, samples, routes.prompts)

    def _senders(self, role: Grid, numbers: Sequence[int]) -> list[int]:
        """The ranks of a role that send these samples, in ascending order."""
        span = role.span
        size = self._batch.samples_per_prompt
        return sorted({span.output_rank(span.replica_of(number // size)) for number in numbers})
