"""Dealing samples out: which train replica learns from which, decided from lengths alone.

Who gives the samples and who takes them hold the same table of a part and come to the same deal, so
a sample travels once, to the replica that learns from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from r1zero.algo.packing import balance_over_replicas
from r1zero.types import Batch, Group


@dataclass(frozen=True, slots=True)
class SampleTable:
    """What every train rank knows of the samples of some groups: n groups of G samples."""

    positions: np.ndarray  # int64 [n], in the batch
    lengths: np.ndarray  # int64 [n, G], response tokens
    counted: np.ndarray  # int64 [n, G], those that the loss mask leaves
    rewards: np.ndarray  # float64 [n, G]
    trains: np.ndarray  # bool [n, G], samples that are learnt from

    @classmethod
    def of(cls, groups: Sequence[Group], group_size: int) -> SampleTable:
        """The table of groups whose samples are scored."""
        shape = (len(groups), group_size)
        lengths = np.zeros(shape, np.int64)
        counted = np.zeros(shape, np.int64)
        rewards = np.zeros(shape, np.float64)
        trains = np.zeros(shape, bool)
        for row, group in enumerate(groups):
            lengths[row] = [sample.length for sample in group.samples]
            counted[row] = [sample.counted for sample in group.samples]
            rewards[row] = group.rewards
            trains[row] = [group.trains and sample.trains for sample in group.samples]
        positions = np.array([group.position for group in groups], np.int64)
        return cls(positions, lengths, counted, rewards, trains)

    @classmethod
    def join(cls, tables: Sequence[SampleTable]) -> SampleTable:
        """One table of several, by position."""
        order = np.argsort(np.concatenate([table.positions for table in tables]))
        return cls(
            np.concatenate([table.positions for table in tables])[order],
            np.concatenate([table.lengths for table in tables])[order],
            np.concatenate([table.counted for table in tables])[order],
            np.concatenate([table.rewards for table in tables])[order],
            np.concatenate([table.trains for table in tables])[order],
        )

    def rows(self, positions: np.ndarray) -> SampleTable:
        """The rows of these positions, all of which are here; this table is in their order."""
        chosen = np.searchsorted(self.positions, positions)
        return SampleTable(
            self.positions[chosen],
            self.lengths[chosen],
            self.counted[chosen],
            self.rewards[chosen],
            self.trains[chosen],
        )


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
    shares: list[list[int]]  # numbers, by replica


@dataclass(frozen=True, slots=True)
class _Entry:
    """A sample as the balance over replicas sees it: see packing.Sized."""

    number: int
    position: int
    prompt_tokens: int
    own_tokens: int


class Dealer:
    """Deals the samples of one global batch out, part by part."""

    def __init__(self, batch: Batch, replicas: int) -> None:
        self._batch = batch
        self._replicas = replicas
        self._known = SampleTable.of([], batch.samples_per_prompt)
        self._updates = 0  # dealt out
        self._loads = [0] * replicas  # tokens, of the update that is being dealt out

    def add(self, table: SampleTable) -> list[Deal]:
        """Take note of the groups of a part; returns what can be learned from now, in order.

        With one update for each minibatch, those minibatches whose groups are all known, and those
        before them. When gradients are accumulated, the part itself.
        """
        batch = self._batch
        if not len(table.positions):
            return []
        is_first = not len(self._known.positions)
        self._known = SampleTable.join([self._known, table])
        if batch.accumulates:
            is_last = len(self._known.positions) == len(batch.prompts)
            return [self._deal(0, is_first, is_last, table.positions, self._numbers_of(table))]
        deals = []
        while self._updates < batch.num_minibatches and self._has_all(self._updates):
            self._loads = [0] * self._replicas
            arrivals = np.array(batch.arrivals(self._updates), np.int64)
            numbers = np.array(batch.samples_of(self._updates), np.int64)
            deals.append(self._deal(self._updates, True, True, arrivals, numbers))
            self._updates += 1
        return deals

    def _has_all(self, minibatch: int) -> bool:
        samples = self._batch.samples_of(minibatch)
        size = self._batch.samples_per_prompt
        needed = range(samples.start // size, (samples.stop - 1) // size + 1)
        return bool(np.isin(np.array(needed), self._known.positions).all())

    def _numbers_of(self, table: SampleTable) -> np.ndarray:
        """All samples of the groups of a table, in order."""
        size = self._batch.samples_per_prompt
        return (table.positions[:, None] * size + np.arange(size)).reshape(-1)

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
        entries = []
        for number, length in zip(learnt, lengths, strict=True):
            prompt = self._batch.prompts[number // size]
            entries.append(_Entry(number, number // size, len(prompt.tokens), length - 1))
        shares = balance_over_replicas(entries, self._loads)
        return Deal(
            update,
            is_first,
            is_last,
            known.rows(positions),
            numbers,
            known.counted[rows, members],
            trains,
            [[entry.number for entry in share] for share in shares],
        )
