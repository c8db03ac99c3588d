"""The way of routes from the rollout ranks to the train ranks, for routing replay: past the
reference, and each to the one replica that replays it.

    rollout output ranks    tables of their groups -> the first of them, which joins them and tells all
    rollout output ranks    routes                 -> the input rank of the replica that learns from them,
                                                      which tells its replica

Routes are most of what there is to send: of Qwen3-30B-A3B 384 bytes a token, where everything else is
12. So they take the shortest way. Rollout ranks deal the samples out by the same table as those who
hand the samples on (handover.py), and come to the same shares. A prompt's routes go once to each
replica that learns from one of its samples.
"""

from __future__ import annotations

from collections.abc import Sequence

from r1zero.algo.dealing import Dealer, SampleTable
from r1zero.distributed.groups import Grid
from r1zero.distributed.transfer import RoleTransfer
from r1zero.types import Batch, Group, RecordedRoutes


class RouteGiver:
    """The end at the rollout ranks, for one global batch. Elsewhere, and of a batch that keeps no
    routes, it does nothing."""

    def __init__(self, move: RoleTransfer, batch: Batch, rollout: Grid, train: Grid) -> None:
        self._move = move
        self._batch = batch
        self._rollout = rollout
        self._train = train
        self._dealer = Dealer(batch, train.span.dp)
        self._held: dict[int, Group] = {}  # by position
        # A batch that is drawn a step ahead may be saved on its way, and sent once more.
        self._keeps = batch.staleness > 0

    def go_on(self, batch: Batch) -> None:
        """Take the plan of another round of the batch."""
        self._batch = batch
        self._dealer.go_on(batch)

    def give(self, groups: Sequence[Group]) -> None:
        """Send the routes of what can be learned from now that these groups, of the next part, are
        there."""
        if not self._batch.keeps_routes:
            return
        if not self._rollout.is_output_rank:
            forget_routes(groups)
            return
        for group in groups:
            self._hold(group)
        table = self._move.join_outputs(
            SampleTable.of(groups, self._batch.samples_per_prompt),
            SampleTable.join,
            self._batch,
            self._rollout,
        )
        for deal in self._dealer.add(table):
            for replica, numbers in enumerate(deal.shares):
                self._send(numbers, self._train.span.input_rank(replica))

    def _hold(self, group: Group) -> None:
        """Keep a group until its samples are dealt out. Nobody asks for the routes of those that do not
        train, unless the batch is saved, and goes on with another configuration in which they do."""
        self._held[group.position] = group
        if self._keeps:
            return
        for sample in group.samples:
            if not (group.trains and sample.trains):
                sample.routes = None

    def _send(self, numbers: Sequence[int], rank: int) -> None:
        """Send the routes of those of these samples that are here."""
        size = self._batch.samples_per_prompt
        mine = [number for number in numbers if number // size in self._held]
        if not mine:
            return
        routes = RecordedRoutes()
        for number in mine:
            group = self._held[number // size]
            sample = group.samples[number % size]
            if group.prompt_routes is not None and sample.routes is not None:
                routes.prompts[group.position] = group.prompt_routes
                routes.samples[number] = sample.routes
            if not self._keeps:
                sample.routes = None
        self._move.send_routes(self._batch, routes, rank)


def forget_routes(groups: Sequence[Group]) -> None:
    """Free the memory of routes that nobody asks for."""
    for group in groups:
        group.prompt_routes = None
        for sample in group.samples:
            sample.routes = None
