"""Which samples run next: plain ordered Python, equal on all ranks of a replica.

Samples wait in the order of the batch (minibatch, prompt, member) and take slots as they get free.
Running samples always fill rows [0, running), so a decoding step touches no idle row.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Ticket:
    """One sample that is wanted: its prompt's position in the batch, its number in the group."""

    position: int
    member: int


@dataclass(slots=True)
class Rows:
    """State of the running samples; arrays have one entry a slot, of which the first `count` run."""

    slots: int
    budget: int  # response tokens a sample may have
    count: int = 0
    tickets: list[Ticket | None] = field(init=False)
    lengths: np.ndarray = field(init=False)  # tokens whose keys are in the cache
    generated: np.ndarray = field(init=False)  # response tokens so far
    tokens: np.ndarray = field(init=False)  # int32 [slots, budget]
    logprobs: np.ndarray = field(init=False)  # float32 [slots, budget]
    uniforms: np.ndarray = field(init=False)  # float32 [slots, budget]

    def __post_init__(self) -> None:
        self.tickets = [None] * self.slots
        self.lengths = np.zeros(self.slots, dtype=np.int64)
        self.generated = np.zeros(self.slots, dtype=np.int64)
        self.tokens = np.zeros((self.slots, self.budget), dtype=np.int32)
        self.logprobs = np.zeros((self.slots, self.budget), dtype=np.float32)
        self.uniforms = np.zeros((self.slots, self.budget), dtype=np.float32)

    def add(self, ticket: Ticket, prompt_length: int, uniforms: np.ndarray) -> int:
        """Give a sample the next free row and return it."""
        row = self.count
        assert row < self.slots
        self.tickets[row], self.lengths[row], self.generated[row] = ticket, prompt_length, 0
        self.uniforms[row] = uniforms
        self.count += 1
        return row

    def record(self, rows: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Append one drawn token to each of these rows."""
        at = self.generated[rows]
        self.tokens[rows, at], self.logprobs[rows, at] = tokens, logprobs
        self.generated[rows] += 1

    def last_tokens(self) -> np.ndarray:
        """The newest token of each running row, int64 [count]: the input of the next decoding step."""
        running = np.arange(self.count)
        return self.tokens[running, self.generated[:self.count] - 1].astype(np.int64)

    def next_uniforms(self, rows: np.ndarray) -> np.ndarray:
        """The uniform number that draws each row's next token."""
        return self.uniforms[rows, self.generated[rows]]

    def remove(self, row: int) -> int | None:
        """Free a row by moving the last running one into it; returns the row moved, if any."""
        self.count -= 1
        last = self.count
        moved = last if row != last else None
        if moved is not None:
            self.tickets[row] = self.tickets[last]
            for state in (self.lengths, self.generated, self.tokens, self.logprobs, self.uniforms):
                state[row] = state[last]
        self.tickets[last] = None
        return moved


class Queue:
    """Samples that wait for a slot, in order."""

    def __init__(self) -> None:
        self._waiting: deque[Ticket] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def extend(self, tickets: list[Ticket]) -> None:
        """Add samples behind those that wait."""
        self._waiting.extend(tickets)

    def take(self, count: int) -> list[Ticket]:
        """The next `count` samples, fewer when fewer wait."""
        return [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
