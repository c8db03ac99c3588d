"""The samples of a rollout replica, from their scores until they are told of and written.

add      groups as they are scored
prepare  summary and rows of a round, in the time that this replica has nothing to generate
write    the rows into the run folder, as soon as the advantages are known
take     the summary, for the controller

Rows have the text with its special tokens, scoring sees it without. One cannot be made of the other
for every tokenizer, so a response is decoded twice: here while others learn, there beside decoding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from r1zero.observe.sample_summary import join_summaries, summarize
from r1zero.observe.samples import sample_table, with_advantages, write_table
from r1zero.run_folder.owner import plain
from r1zero.run_folder.samples import SampleFiles
from r1zero.types import Batch, Group, SampleSummary


class SampleLog:
    """Lives on the output rank of a rollout replica. Batches do not mix: one can be generated while
    another is learnt from."""

    def __init__(
        self,
        files: SampleFiles,
        replica: int,
        decode: Callable[[np.ndarray], str],
        unused: Sequence[range],
        functions: Sequence[str],
        verdict_functions: Sequence[str] = (),
    ) -> None:
        """`decode` turns tokens into text, special ones written out; `unused` are ids that stand
        for no token, `functions` all reward functions, `verdict_functions` those that say whether a
        response is right."""
        self._files = files
        self._replica = replica
        self._decode = decode
        self._unused = unused
        self._functions = functions
        self._verdict_functions = verdict_functions
        # By the step of the batch.
        self._groups: defaultdict[int, list[Group]] = defaultdict(list)
        self._summaries: defaultdict[int, list[SampleSummary]] = defaultdict(list)  # of each round
        self._tables: defaultdict[int, list[pa.Table]] = defaultdict(list)
        self.unwritten: str | None = None  # why the rows written last are not there

    def add(self, batch: Batch, groups: Sequence[Group]) -> None:
        """Take scored groups of the batch."""
        self._groups[batch.step] += groups

    def prepare(self, batch: Batch) -> None:
        """Sum up the groups of this round of the batch, which are complete, and make rows of them if
        this step leaves any."""
        groups = [group for group in self._groups[batch.step] if group.position >= batch.first]
        summary = summarize(groups, self._unused, self._verdict_functions)
        self._summaries[batch.step].append(summary)
        if groups and self._files.due(batch.step):
            table = sample_table(groups, self._decode, self._functions)
            self._tables[batch.step].append(table)

    def write(self, batch: Batch, advantages: np.ndarray, folder: Path) -> None:
        """Write the rows into the run folder; `advantages` are those of the batch, [P, G].

        Trouble is noted in `unwritten`: training goes on without the rows.
        """
        self.unwritten = None
        surplus = _surplus_tokens(self._groups[batch.step], advantages)
        last = self._summaries[batch.step][-1]
        self._summaries[batch.step][-1] = replace(last, surplus_tokens=surplus)
        tables = self._tables.pop(batch.step, [])
        if not tables:
            return
        try:
            path = self._files.open_share(folder, batch.step, self._replica)
            write_table(path, with_advantages(pa.concat_tables(tables), advantages))
        except OSError as error:
            self.unwritten = plain(error)

    def take(self, batch: Batch) -> SampleSummary | None:
        """Hand out the summary of the batch, whose groups end here."""
        del self._groups[batch.step]
        return join_summaries(self._summaries.pop(batch.step))

    def waiting(self) -> list[Group]:
        """The groups that are not told of yet: a checkpoint keeps those of a batch that is drawn
        and not learnt from."""
        return [group for groups in self._groups.values() for group in groups]


def _surplus_tokens(groups: Sequence[Group], advantages: np.ndarray) -> int:
    """Response tokens of kept groups that nobody learned from, as far as loss masks leave them."""
    surplus = [
        group for group in groups if group.trains and np.isnan(advantages[group.position, 0])
    ]
    return sum(sample.counted for group in surplus for sample in group.training)


class IdleSampleLog:
    """The log of every other rank, which has no samples to tell of."""

    unwritten: str | None = None

    def add(self, batch: Batch, groups: Sequence[Group]) -> None:
        pass

    def prepare(self, batch: Batch) -> None:
        pass

    def write(self, batch: Batch, advantages: np.ndarray, folder: Path) -> None:
        pass

    def take(self, batch: Batch) -> SampleSummary | None:
        return None

    def waiting(self) -> list[Group]:
        return []


AnySampleLog = SampleLog | IdleSampleLog
