"""Dealing samples out: which train replica learns from which, decided from lengths alone.

Who gives the samples and who takes them hold the same table of a part and come to the same deal, so
a sample travels once, to the replica that learns from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from r1zero.algo.packing import balance_over_replicas
from r1zero.algo.selection import PUT_OFF
from r1zero.types import Batch, Group


@dataclass(frozen=True, slots=True)
class SampleTable:
    """What every train rank knows of the samples of some groups: n groups of G samples."""

    positions: np.ndarray  # int64 [n], in the batch
    lengths: np.ndarray  # int64 [n, G], response tokens
    counted: np.ndarray  # int64 [n, G], those that the loss mask leaves
    rewards: np.ndarray  # float64 [n, G]
    right: np.ndarray  # bool [n, G], the verdicts
    scores: np.ndarray  # float64 [n, G, K], of K reward functions; K is 0 if nobody needs them
    trains: np.ndarray  # bool [n, G], samples that are learnt from
    put_off: np.ndarray  # bool [n], groups of a short step that have not ended

    @classmethod
    def of(cls, groups: Sequence[Group], group_size: int) -> SampleTable:
        """The table of groups whose samples are scored."""
        shape = (len(groups), group_size)
        lengths = np.zeros(shape, np.int64)
        counted = np.zeros(shape, np.int64)
        rewards = np.zeros(shape, np.float64)
        right = np.zeros(shape, bool)
        scores = np.zeros((*shape, _num_scores(groups)), np.float64)
        trains = np.zeros(shape, bool)
        for row, group in enumerate(groups):
            lengths[row] = [sample.length for sample in group.samples]
            counted[row] = [sample.counted for sample in group.samples]
            rewards[row] = group.rewards
            right[row] = [sample.right for sample in group.samples]
            if scores.size:
                scores[row] = [sample.score_values for sample in group.samples]
            trains[row] = [group.trains and sample.trains for sample in group.samples]
        positions = np.array([group.position for group in groups], np.int64)
        put_off = np.array([group.dropped == PUT_OFF for group in groups], bool)
        return cls(positions, lengths, counted, rewards, right, scores, trains, put_off)

    @classmethod
    def join(cls, tables: Sequence[SampleTable]) -> SampleTable:
        """One table of several, by position."""
        # one without groups does not know how many scores there are
        filled = [table for table in tables if len(table.positions)] or tables[:1]
        order = np.argsort(np.concatenate([table.positions for table in filled]))
        columns = [field.name for field in fields(cls)]
        return cls(
            *(np.concatenate([getattr(table, name) for table in filled])[order] for name in columns)
        )

    @property
    def kept(self) -> np.ndarray:
        """Whether anything of a group is learnt from: bool [n]."""
        return np.asarray(self.trains.any(axis=1))

    def rows(self, positions: np.ndarray) -> SampleTable:
        """The rows of these positions, all of which are here; this table is in their order."""
        chosen = np.searchsorted(self.positions, positions)
        columns = [field.name for field in fields(self)]
        return SampleTable(*(getattr(self, name)[chosen] for name in columns))


def _num_scores(groups: Sequence[Group]) -> int:
    """How many values of reward functions each sample of some groups has."""
    for group in groups:
        values = group.samples[0].score_values
        if values is not None:
            return len(values)
    return 0


@dataclass(frozen=True, slots=True)
class SampleSize:
    """A sample as balance and microbatches see it, on ranks that do not have it: see packing.Sized."""

    number: int
    position: int
    prompt_tokens: int
    own_tokens: int


@dataclass(frozen=True, slots=True)
class Deal:
    """Samples that are learned from together, and the share of each train replica."""

    update: int  # of the global batch, that they are for
    is_first: bool  # of that update
    is_last: bool  # with it the update is complete
    groups: SampleTable  # whose advantages are due: those that begin in it
    numbers: np.ndarray  # int64 [n], its samples, ascending: position * G + member
    counted: np.ndarray  # int64 [n], tokens of each that the loss mask leaves
    trains: np.ndarray  # bool [n], those that are learnt from, and so in a share
    sizes: list[list[SampleSize]]  # of the samples in each replica's share, by number

    @property
    def shares(self) -> list[list[int]]:
        """The numbers of each replica's samples."""
        return [[size.number for size in share] for share in self.sizes]


class Dealer:
    """Deals the samples of one global batch out, part by part and round by round."""

    def __init__(self, batch: Batch, replicas: int) -> None:
        self._batch = batch
        self._replicas = replicas
        self._known = SampleTable.of([], batch.samples_per_prompt)
        self._updates = 0  # dealt out
        self._loads = [0] * replicas  # tokens, of the update that is being dealt out
        self._dealt: set[int] = set()  # positions of the pool

    @property
    def known(self) -> SampleTable:
        """All groups that have come, by position."""
        return self._known

    def go_on(self, batch: Batch) -> None:
        """Take the plan of another round of the same batch."""
        self._batch = batch

    def add(self, table: SampleTable) -> list[Deal]:
        """Take note of the groups of a part; returns what can be learned from now, in order.

        With one update for each minibatch, those minibatches whose groups are all known, and those
        before them. When gradients are accumulated, what is sure to train of the groups that are
        known: of a part all, of a pool see `_sure`.
        """
        batch = self._batch
        if not len(table.positions):
            return []
        is_first = not len(self._known.positions)
        self._known = SampleTable.join([self._known, table])
        if batch.pool is not None:
            return self._add_to_pool(batch.pool)
        if batch.accumulates:
            is_last = self._all_known
            numbers = self._numbers_of(table.positions)
            return [self._deal(0, is_first, is_last, table.positions, numbers)]
        deals = []
        while self._updates < batch.num_minibatches and self._has_all(self._updates):
            arrivals = np.array(batch.arrivals(self._updates), np.int64)
            numbers = np.array(batch.samples_of(self._updates), np.int64)
            deals.append(self._deal_minibatch(arrivals, numbers))
        return deals

    # -- the pool -------------------------------------------------------------------------------

    def _add_to_pool(self, pool: int) -> list[Deal]:
        """What can be learned from now of the first `pool` groups that are kept, by position.

        Positions 0 to 7 with two groups in a minibatch and a pool of four; 1 3 4 6 7 are kept. When 0
        to 3 are known, 1 and 3 are dealt out; when all are, 4 and 6, and 7 is left over. What the last
        round brings is dealt out in a smaller minibatch, if it is too little.
        """
        is_over = self._all_known and (not self._batch.rounds_left or self._in_pool.sum() >= pool)
        if self._batch.accumulates:
            return self._accumulate(self._sure(pool), is_over)
        left = [position for position in self._settled(pool) if position not in self._dealt]
        size = self._batch.minibatch_size // self._batch.samples_per_prompt
        deals = []
        while len(left) >= size or (is_over and left):
            positions = np.array(left[:size], np.int64)
            deals.append(self._deal_minibatch(positions, self._numbers_of(positions)))
            self._dealt.update(left[:size])
            left = left[size:]
        return deals

    def _accumulate(self, sure: list[int], is_over: bool) -> list[Deal]:
        """One deal with those of the pool that were not dealt out yet; without any if the batch ends
        with groups that are dropped."""
        fresh = [position for position in sure if position not in self._dealt]
        is_first = not self._dealt
        was_full = len(self._dealt) == self._batch.pool
        self._dealt.update(fresh)
        is_last = is_over or len(self._dealt) == self._batch.pool
        if not fresh and (is_first or was_full or not is_last):
            return []
        positions = np.array(fresh, np.int64)
        return [self._deal(0, is_first, is_last, positions, self._numbers_of(positions))]

    def _settled(self, pool: int) -> list[int]:
        """Positions of kept groups before which all are known, the first `pool` of them: their order
        is that in which they train."""
        known = self._known
        unbroken = known.positions == np.arange(len(known.positions))
        return known.positions[unbroken & self._in_pool][:pool].tolist()

    def _sure(self, pool: int) -> list[int]:
        """Positions of kept groups that are among the first `pool`, whatever the unknown ones turn
        out to be: of a pool of two, position 2 is not while both 0 and 1 may still be kept."""
        known = self._known
        may_train = np.ones(len(self._batch.prompts), bool)
        may_train[known.positions] = self._in_pool
        before = np.cumsum(may_train) - may_train
        return known.positions[self._in_pool & (before[known.positions] < pool)].tolist()

    @property
    def _in_pool(self) -> np.ndarray:
        """Which of the known groups count to the pool: those that are kept, and in a short step those
        that have ended, whether they train or not."""
        if self._batch.response_limit is None:
            return self._known.kept
        return ~self._known.put_off

    # -- deals ----------------------------------------------------------------------------------

    @property
    def _all_known(self) -> bool:
        """Of all rounds so far."""
        return len(self._known.positions) == len(self._batch.prompts)

    def _has_all(self, minibatch: int) -> bool:
        samples = self._batch.samples_of(minibatch)
        size = self._batch.samples_per_prompt
        needed = range(samples.start // size, (samples.stop - 1) // size + 1)
        return bool(np.isin(np.array(needed), self._known.positions).all())

    def _numbers_of(self, positions: np.ndarray) -> np.ndarray:
        """All samples of the groups at these positions, in order."""
        size = self._batch.samples_per_prompt
        return (positions[:, None] * size + np.arange(size)).reshape(-1)

    def _deal_minibatch(self, positions: np.ndarray, numbers: np.ndarray) -> Deal:
        """Deal the next minibatch out, an update of its own."""
        self._loads = [0] * self._replicas
        update = self._updates
        self._updates += 1
        return self._deal(update, True, True, positions, numbers)

    def _deal(
        self,
        update: int,
        is_first: bool,
        is_last: bool,
        positions: np.ndarray,
        numbers: np.ndarray,
    ) -> Deal:
        """Deal these samples out; those of groups that do not train are in no share."""
        size = self._batch.samples_per_prompt
        known = self._known
        rows = np.searchsorted(known.positions, numbers // size)
        members = numbers % size
        trains = known.trains[rows, members]
        learnt = numbers[trains].tolist()
        lengths = known.lengths[rows, members][trains].tolist()
        sizes = []
        for number, length in zip(learnt, lengths, strict=True):
            prompt = self._batch.prompts[number // size]
            sizes.append(SampleSize(number, number // size, len(prompt.tokens), length - 1))
        return Deal(
            update,
            is_first,
            is_last,
            known.rows(positions),
            numbers,
            known.counted[rows, members],
            trains,
            balance_over_replicas(sizes, self._loads),
        )
