"""Graph capture on NPUs: one launch a decoding step instead of some hundred.

A graph has fixed shapes and addresses, so there is one for each number of rows that lasts, with
inputs of its own that every step is copied into. The lengths that the attention takes from the host
are handed over before each replay. Only for NPUs; checked against torch_npu's published contract,
not yet run on hardware.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

from r1zero.ops.npu_graph import capture_graph, replay_graph
from r1zero.rollout.block_attention import DecodeStep

# Decoding steps with the same number of rows that make it worth capturing, which costs about as
# much.
WORTH_CAPTURING = 16
# Some cards hold six graphs with collectives at a time.
MAX_GRAPHS = 4


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph, what it reads and what it writes."""

    graph: object
    tokens: torch.Tensor
    step: DecodeStep
    logits: torch.Tensor


class DecodeGraphs:
    """Runs decoding steps, captured where that pays. `run(tokens, step)` computes the logits of one
    step."""

    def __init__(
        self, run: Callable[[torch.Tensor, DecodeStep], torch.Tensor], max_positions: int
    ) -> None:
        self._run = run
        self._max_positions = max_positions
        self._captured: dict[int, _Captured] = {}  # by number of rows
        self._seen: dict[int, int] = {}
        self._blocks = 0  # of the cache that the graphs read

    def __call__(self, tokens: torch.Tensor, step: DecodeStep) -> torch.Tensor:
        """Logits [n, V / TP], to be used before the next call."""
        rows = len(tokens)
        blocks = step.layout.pool.num_blocks
        if blocks != self._blocks:  # allocated anew: layers lie elsewhere, if not the first one
            self._blocks = blocks
            self._captured = {}
            self._seen = {}
        if rows not in self._captured:
            self._seen[rows] = self._seen.get(rows, 0) + 1
            if self._seen[rows] < WORTH_CAPTURING or len(self._captured) == MAX_GRAPHS:
                return self._run(tokens, step)
            self._captured[rows] = self._capture(tokens, step)
        captured = self._captured[rows]
        captured.tokens.copy_(tokens)
        _fill(captured.step, step)
        replay_graph(captured.graph, step.lengths)
        return captured.logits

    def _capture(self, tokens: torch.Tensor, step: DecodeStep) -> _Captured:
        fixed = copy.copy(step)
        most = -(-self._max_positions // step.layout.pool.block)
        fixed.layout = copy.copy(step.layout)
        # wide enough for any sequence
        fixed.layout.table = step.layout.table.new_zeros(len(tokens), most)
        fixed.positions = step.positions.clone()
        fixed.block = step.block.clone()
        fixed.offset = step.offset.clone()
        tokens = tokens.clone()
        _fill(fixed, step)
        self._run(tokens, fixed)  # kernels choose their workspaces before, not within
        graph, logits = capture_graph(lambda: self._run(tokens, fixed))
        return _Captured(graph, tokens, fixed, logits)


def _fill(fixed: DecodeStep, step: DecodeStep) -> None:
    """Copy a step's tensors into those that a graph reads."""
    fixed.layout.table[:, : step.layout.table.shape[1]] = step.layout.table
    fixed.positions.copy_(step.positions)
    fixed.block.copy_(step.block)
    fixed.offset.copy_(step.offset)
