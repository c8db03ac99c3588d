"""Graph capture on NPUs: one launch a decoding step instead of some hundred.

A graph has fixed shapes and addresses. So there is one for each of a few numbers of rows, with
inputs of its own that every step is copied into, and rows that no sample has are padding. The
lengths that the attention takes from the host are handed over before each replay. Checked against
torch_npu's published contract and on a stand-in, not yet run on hardware.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

from r1zero.ops.npu_graph import GraphPool
from r1zero.rollout.block_attention import DecodeLayout, DecodeStep, PassOutput

# Rows of the graphs. Up to some 200 rows (an estimate: 300 TFLOP/s over 1.6 TB/s) a step takes the
# time of reading the weights, however many rows there are, so sizes may double; below 16 nothing is
# gained. Beyond the last one kernels run long enough to hide their launches. Six, since some cards
# hold no more graphs with collectives.
SIZES = (16, 32, 64, 128, 256, 512)
# Rows of a graph that pad at most; they are the last ones.
MOST_PADDING = SIZES[-1] // 2


class DecodeGraphs:
    """Runs decoding steps by graphs. `run(tokens, step)` computes what a step is to give.

    Needs a cache with MOST_PADDING spare places (BlockPool).
    """

    def __init__(
        self, run: Callable[[torch.Tensor, DecodeStep], PassOutput], max_positions: int
    ) -> None:
        self._run = run
        self._max_positions = max_positions
        self._captured: dict[int, _Captured] = {}  # by number of rows
        self._blocks = 0  # of the cache that the graphs read
        self._graphs: GraphPool  # made for that cache

    def __call__(self, tokens: torch.Tensor, step: DecodeStep) -> PassOutput:
        """What `run` gives for each row, to be used before the next call."""
        rows = len(tokens)
        if rows > SIZES[-1]:
            return self._run(tokens, step)
        self._drop_if_moved(step)
        size = next(size for size in SIZES if size >= rows)
        if size not in self._captured:
            self._captured[size] = self._capture(size, tokens, step)
        captured = self._captured[size]
        captured.inputs.fill(tokens, step)
        self._graphs.replay(size, step.lengths + [1] * (size - rows))
        return captured.output.first(rows)

    def _drop_if_moved(self, step: DecodeStep) -> None:
        """Forget graphs that read a cache that was allocated anew: layers lie elsewhere, if not
        the first one."""
        blocks = step.layout.pool.num_blocks
        if blocks != self._blocks:
            self._blocks = blocks
            self._captured = {}
            self._graphs = GraphPool()  # memory of a pool whose graphs are gone is not used again

    def _capture(self, size: int, tokens: torch.Tensor, step: DecodeStep) -> _Captured:
        most_blocks = -(-self._max_positions // step.layout.pool.block)
        inputs = _Inputs(size, most_blocks, step)
        inputs.fill(tokens, step)
        self._run(inputs.tokens, inputs.step)  # kernels choose their workspaces before, not within
        output = self._graphs.capture(size, lambda: self._run(inputs.tokens, inputs.step))
        return _Captured(inputs, output)


class _Inputs:
    """What a graph of `size` rows reads: the rows of a step, then rows that pad.

    A row that pads is one token long. It stands in a spare block of the cache, where it writes to a
    place of its own, since no two rows may write to one.
    """

    def __init__(self, size: int, most_blocks: int, like: DecodeStep) -> None:
        pool = like.layout.pool
        place = torch.arange(size, device=like.layout.device) % MOST_PADDING
        self.tokens = torch.zeros_like(place)
        self.step = copy.copy(like)
        self.step.layout = copy.copy(like.layout)
        self.step.lengths = [1] * size
        self.step.positions = torch.zeros_like(place)
        self.step.block = pool.num_blocks + place // pool.block
        self.step.offset = place % pool.block
        table = self.step.block[:, None].expand(-1, most_blocks)  # wide enough for any sequence
        self.step.layout.table = table.to(torch.int32).contiguous()
        self._padding_block = self.step.block.clone()
        self._padding_offset = self.step.offset.clone()
        self._layout: DecodeLayout | None = None  # that was copied last

    def fill(self, tokens: torch.Tensor, step: DecodeStep) -> None:
        """Copy a step in."""
        rows = len(tokens)
        self.tokens[:rows] = tokens
        self.step.positions[:rows] = step.positions
        self.step.offset[:rows] = step.offset
        if step.layout is not self._layout:  # rows or blocks have changed
            self._layout = step.layout
            width = step.layout.table.shape[1]
            self.step.layout.table[:rows, :width] = step.layout.table
            self.step.block[:rows] = step.block
            self._pad(rows)

    def _pad(self, first: int) -> None:
        """Let the rows from `first` on pad."""
        self.step.positions[first:] = 0
        self.step.offset[first:] = self._padding_offset[first:]
        self.step.block[first:] = self._padding_block[first:]
        self.step.layout.table[first:, 0] = self._padding_block[first:]


@dataclass(frozen=True, slots=True)
class _Captured:
    """What a graph reads and what it writes."""

    inputs: _Inputs
    output: PassOutput
