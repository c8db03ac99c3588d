"""The scheduler of continuous batching: which samples run, and in which rows; plain Python.

Samples wait in the order of the batch (minibatch, prompt, member), which is their priority: rows
and blocks go to the first that waits, and when blocks run out the last that runs gives its own back
and waits again, keeping its tokens. Running samples always fill rows [0, count).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True, order=True)
class SampleId:
    """One sample that is wanted: its prompt's position in the batch, its number in the group."""

    position: int
    member: int


@dataclass(slots=True)
class PartialSample:
    """What is known of one sample: the tokens drawn, their log-probs, and the numbers that draw
    them."""

    sample_id: SampleId
    uniforms: np.ndarray  # float32 [budget]
    tokens: np.ndarray  # int32 [budget], the first `count` are drawn
    logprobs: np.ndarray  # float32 [budget]
    count: int = 0
    # uint8 [budget, MoE layers, k], the experts of each drawn token but the newest, which has run
    # through no layer yet; None where they are not kept
    routes: np.ndarray | None = None

    @classmethod
    def fresh(
        cls,
        sample_id: SampleId,
        uniforms: np.ndarray,
        routes_of_token: tuple[int, int] | None = None,
    ) -> PartialSample:
        """A sample without tokens; its budget is the number of uniforms. `routes_of_token`: MoE
        layers and k, to keep the experts."""
        budget = len(uniforms)
        tokens = np.zeros(budget, np.int32)
        logprobs = np.zeros(budget, np.float32)
        routes = None
        if routes_of_token is not None:
            routes = np.zeros((budget, *routes_of_token), np.uint8)
        return cls(sample_id, uniforms, tokens, logprobs, routes=routes)

    @property
    def known_routes(self) -> np.ndarray | None:
        """The experts of the drawn tokens but the newest: uint8 [count - 1, MoE layers, k]."""
        if self.routes is None:
            return None
        return self.routes[: self.count - 1]


@dataclass(slots=True)
class RunningBatch:
    """The running samples. Arrays have one entry a row, of which the first `count` are in use."""

    size: int
    count: int = 0
    sequences: list[PartialSample] = field(default_factory=list)
    blocks: list[list[int]] = field(default_factory=list)  # each row's own
    lengths: np.ndarray = field(init=False)  # tokens in the cache, prompt included
    newest: np.ndarray = field(init=False)  # int64, the token drawn last: the next input

    def __post_init__(self) -> None:
        self.lengths = np.zeros(self.size, dtype=np.int64)
        self.newest = np.zeros(self.size, dtype=np.int64)

    def add(self, sequence: PartialSample, length: int, blocks: list[int]) -> int:
        """Give a sample the next free row and return it."""
        row = self.count
        assert row < self.size
        self.sequences.append(sequence)
        self.blocks.append(blocks)
        self.lengths[row] = length
        if sequence.count:
            self.newest[row] = sequence.tokens[sequence.count - 1]
        self.count += 1
        return row

    def remove(self, row: int) -> tuple[PartialSample, list[int]]:
        """Take a sample out; the last running one moves into its row."""
        self.count -= 1
        gone = self.sequences[row], self.blocks[row]
        last = self.sequences.pop()
        blocks = self.blocks.pop()
        if row != self.count:
            self.sequences[row] = last
            self.blocks[row] = blocks
            self.lengths[row], self.newest[row] = self.lengths[self.count], self.newest[self.count]
        return gone

    def last(self) -> int:
        """The row of the sample with the lowest priority."""
        return max(range(self.count), key=lambda row: self.sequences[row].sample_id)

    def uniforms(self, rows: list[int]) -> np.ndarray:
        """The number that draws each row's next token, float32."""
        running = [self.sequences[row] for row in rows]
        return np.array(
            [sequence.uniforms[sequence.count] for sequence in running], dtype=np.float32
        )

    def record_routes(self, routes: np.ndarray) -> None:
        """Take the experts that the newest token of every row went to, uint8 [n, MoE layers, k]."""
        for sequence, of_token in zip(self.sequences, routes, strict=True):
            assert sequence.routes is not None, "a row of a request that keeps no routes"
            sequence.routes[sequence.count - 1] = of_token

    def record(self, rows: list[int], tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Append one drawn token to each of these rows."""
        self.newest[rows] = tokens
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            sequence = self.sequences[row]
            sequence.tokens[sequence.count] = token
            sequence.logprobs[sequence.count] = logprob
            sequence.count += 1


class Queue:
    """Samples that wait for a row, by priority; those that lost theirs keep their tokens."""

    def __init__(self) -> None:
        self._waiting: list[SampleId] = []
        self._begun: dict[SampleId, PartialSample] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, sample_id: SampleId, begun: PartialSample | None = None) -> None:
        """Let a sample wait."""
        heapq.heappush(self._waiting, sample_id)
        if begun is not None:
            self._begun[sample_id] = begun

    def first(self, count: int) -> list[SampleId]:
        """Look at the next `count` samples."""
        return heapq.nsmallest(count, self._waiting)

    def begun(self, sample_id: SampleId) -> PartialSample | None:
        """What a waiting sample has drawn already, if anything."""
        return self._begun.get(sample_id)

    def take(self) -> tuple[SampleId, PartialSample | None]:
        """Take the next sample out."""
        sample_id = heapq.heappop(self._waiting)
        return sample_id, self._begun.pop(sample_id, None)
