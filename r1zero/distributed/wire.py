"""How samples travel: groups as one flat buffer, which the receiver reads where it lies.

A buffer is bytes of one tensor, arrays end to end without padding, widest first so that each lies
where its numbers may:

    int64     number of groups, then a row of GROUP for each
    int64     number of samples, then a row of SAMPLE for each, in order of the groups
    float64   values of the reward functions of those samples that have them
    int32     tokens of the samples that are learnt from
    float32   their log-probs
    float32   reference log-probs of those that have them
    uint8     loss masks of those that leave a token out, 8 tokens a byte

Two groups at the positions 4 and 9 with two samples of 3 and 0, 2 and 5 tokens, before the
reference has seen them: 8 + 2 * 24 bytes for the groups, 8 + 4 * 48 for the samples, 10 * 4 for the
tokens, 10 * 4 for the log-probs. If the second group does not train, its samples are stubs, rows
without arrays: 3 * 4 bytes of tokens, and as many of log-probs.

Prompts, data rows, scores and the reason why a group was dropped do not travel: every rank has the
plan with its prompts, and the others stay where they were given; but for the values of the scores,
where advantages need them. Advantages are computed where they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from r1zero.types import Group, Prompt, Sample, TokenCounts

GROUP = np.dtype(
    [
        ("position", np.int64),
        ("samples", np.int64),
        ("trains", np.int64),
        ("dropped", "S16"),  # why it does not train, in ASCII
    ]
)
SAMPLE = np.dtype(
    [
        ("number", np.int64),  # in the global batch; in the buffer where groups travel
        ("length", np.int64),
        ("counted", np.int64),  # tokens that the loss mask leaves
        ("version", np.int64),
        ("flags", np.int64),
        ("reward", np.float64),
    ]
)
# Flags of a sample.
TRUNCATED = 1
HAS_REF = 2
HAS_MASK = 4
STUB = 8  # it is not learnt from, and has no arrays but its scores
RIGHT = 16
SCORES_SHIFT = 16  # from this bit on: how many values of reward functions it has


def pack(groups: Sequence[Group]) -> torch.Tensor:
    """Lay groups into a buffer, uint8 [bytes]."""
    rows = [
        (group.position, len(group.samples), group.trains, group.dropped.encode("ascii"))
        for group in groups
    ]
    samples = [
        sample if group.trains else replace(sample, trains=False)
        for group in groups
        for sample in group.samples
    ]
    return _joined([*_table(GROUP, rows), *_columns(range(len(samples)), samples)])


def unpack(buffer: torch.Tensor, prompts: Sequence[Prompt]) -> list[Group]:
    """The groups in a buffer, with the prompts [P] of their batch. Arrays are views of the buffer.

    What does not travel is empty. A mask that leaves nothing out comes as None.
    """
    reader = _Reader(buffer)
    rows = reader.table(GROUP)
    samples = iter(reader.samples().values())
    groups = []
    for position, count, trains, dropped in rows.tolist():
        members = list(islice(samples, count))
        prompt = prompts[position]
        groups.append(Group(position, prompt, members, bool(trains), dropped.decode("ascii")))
    return groups


def pack_samples(samples: Mapping[int, Sample]) -> torch.Tensor:
    """Lay samples, by their numbers in the batch, into a buffer without groups: uint8 [bytes]."""
    return _joined(_columns(samples.keys(), list(samples.values())))


def unpack_samples(buffer: torch.Tensor) -> dict[int, Sample]:
    """The inverse of `pack_samples`, in the same order. Arrays are views of the buffer."""
    return _Reader(buffer).samples()


def _columns(numbers: Iterable[int], samples: Sequence[Sample]) -> list[np.ndarray]:
    """The arrays of some samples in the order of the buffer."""
    rows = []
    for number, sample in zip(numbers, samples, strict=True):
        counts = (sample.length, sample.counted)
        rows.append((number, *counts, sample.version, _flags(sample), sample.reward))
    columns = _table(SAMPLE, rows)
    for sample in samples:
        if sample.score_values is not None:
            columns.append(np.ascontiguousarray(sample.score_values, np.float64))
    training = [sample for sample in samples if sample.trains]
    columns += [np.ascontiguousarray(sample.tokens, np.int32) for sample in training]
    columns += [np.ascontiguousarray(sample.logprobs, np.float32) for sample in training]
    for sample in training:
        if sample.ref_logprobs is not None:
            columns.append(np.ascontiguousarray(sample.ref_logprobs, np.float32))
    columns += [np.packbits(sample.mask) for sample in training if _leaves_out(sample)]
    return columns


def _flags(sample: Sample) -> int:
    flags = 0
    if sample.truncated:
        flags |= TRUNCATED
    if sample.right:
        flags |= RIGHT
    if sample.score_values is not None:
        flags |= len(sample.score_values) << SCORES_SHIFT
    if not sample.trains:
        return flags | STUB
    if sample.ref_logprobs is not None:
        flags |= HAS_REF
    if _leaves_out(sample):
        flags |= HAS_MASK
    return flags


def _leaves_out(sample: Sample) -> bool:
    """Whether the loss leaves a token of it out."""
    return sample.loss_mask is not None and not sample.loss_mask.all()


def _table(kind: np.dtype, rows: list[tuple]) -> list[np.ndarray]:
    """The number of rows, and the rows."""
    return [np.array([len(rows)], np.int64), np.array(rows, kind)]


def _joined(columns: Sequence[np.ndarray]) -> torch.Tensor:
    """Lay arrays end to end as bytes. The only copy on the way to the wire."""
    buffer = torch.empty(sum(column.nbytes for column in columns), dtype=torch.uint8)
    np.concatenate([column.view(np.uint8) for column in columns], out=buffer.numpy())
    return buffer


class _Reader:
    """Takes arrays from a buffer, from its beginning to its end."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._bytes = buffer.numpy()
        self._at = 0

    def table(self, kind: np.dtype) -> np.ndarray:
        """The next table: its number of rows, and the rows."""
        (count,) = self._take(np.dtype(np.int64), 1)
        return self._take(kind, int(count))

    def samples(self) -> dict[int, Sample]:
        """The samples, by their numbers, which are all that is left in the buffer."""
        rows = self.table(SAMPLE)
        scores = self._scores(rows["flags"] >> SCORES_SHIFT)
        is_stub = rows["flags"] & STUB != 0
        held = np.where(is_stub, 0, rows["length"]).tolist()
        tokens = [self._take(np.dtype(np.int32), length) for length in held]
        logprobs = [self._take(np.dtype(np.float32), length) for length in held]
        found: dict[int, Sample] = {}
        for at, (number, length, counted, version, flags, reward) in enumerate(rows.tolist()):
            truncated = bool(flags & TRUNCATED)
            sample = Sample(tokens[at], logprobs[at], truncated, version, reward=reward)
            sample.right = bool(flags & RIGHT)
            sample.score_values = scores[at]
            if is_stub[at]:
                sample.trains = False
                sample.stub = TokenCounts(length, counted)
            found[number] = sample
        for sample in self._flagged(found, rows, HAS_REF):
            sample.ref_logprobs = self._take(np.dtype(np.float32), len(sample.tokens))
        for sample in self._flagged(found, rows, HAS_MASK):
            sample.loss_mask = self._mask(len(sample.tokens))
        assert self._at == len(self._bytes), "a buffer is read to its end"
        return found

    def _flagged(self, found: dict[int, Sample], rows: np.ndarray, flag: int) -> list[Sample]:
        """Those samples that have this flag."""
        return [found[number] for number in rows["number"][rows["flags"] & flag != 0].tolist()]

    def _scores(self, counts: np.ndarray) -> list[np.ndarray | None]:
        """The values of the reward functions of each sample, None for one without."""
        kind = np.dtype(np.float64)
        return [self._take(kind, count) if count else None for count in counts.tolist()]

    def _mask(self, length: int) -> np.ndarray:
        bits = self._take(np.dtype(np.uint8), -(-length // 8))
        return np.unpackbits(bits, count=length).view(bool)

    def _take(self, kind: np.dtype, count: int) -> np.ndarray:
        begin = self._at
        self._at += count * kind.itemsize
        return self._bytes[begin : self._at].view(kind)
