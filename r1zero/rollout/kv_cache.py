"""The paged KV cache: one pool, prompts' shared blocks at its low end, samples' own at its high.

A block holds `block` consecutive tokens of one sequence. The whole blocks of a prompt are shared by
its group; what is left of the prompt is copied into each member's first own block, so every
sequence is a plain list of blocks of which only the last is partly filled. Both ends give out the
block nearest to them first: attention over all blocks in use is then attention over two compact
ranges.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch

from r1zero.models.config import ModelConfig
from r1zero.models.sizes import CPU_CACHE_BLOCK, NPU_CACHE_BLOCK


@dataclass(frozen=True, slots=True)
class SampleBlocks:
    """Where one running sample keeps its tokens: shared blocks of its prompt, then its own."""

    position: int  # of its prompt: rows of one group share blocks
    shared: list[int]
    own: list[int]


class BlockPool:
    """The keys and values of all running samples and their prompts: [layers, blocks, kv heads,
    block, D].

    With latent attention a token has one key, with the position, of `rope_dim` columns, and for a
    value its latent, of `rank` columns.

    That is their shape; how they lie in memory is what reads them fastest. `token_major`: as
    [layers, blocks, block, kv heads, D]. Behind the blocks that can be taken, blocks for `spare`
    more tokens belong to nobody: rows that pad a step write there.
    """

    def __init__(
        self,
        shape: ModelConfig,
        kv_heads: int,
        dtype: torch.dtype,
        device: torch.device,
        block: int | None = None,
        token_major: bool = False,
        spare: int = 0,
    ) -> None:
        self.block = block or (NPU_CACHE_BLOCK if device.type == "npu" else CPU_CACHE_BLOCK)
        self.num_blocks = 0
        self._layout = (shape.num_layers, kv_heads, dtype, device)
        self._key_dim, self._value_dim = _columns(shape)
        self._token_major = token_major
        self._spare_blocks = -(-spare // self.block)
        self.keys = self.values = torch.empty(0)
        self._free: set[int] = set()
        self._shared: set[int] = set()
        self._own: set[int] = set()
        self._lowest: list[int] = []  # heaps of the free ones from either end
        self._highest: list[int] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def shared_range(self) -> int:
        """Shared blocks lie in [0, shared_range); own ones may, too, when blocks are scarce."""
        return max(self._shared, default=-1) + 1

    @property
    def own_start(self) -> int:
        """Own blocks lie in [own_start, num_blocks); shared ones may, too, when blocks are
        scarce."""
        return min(self._own, default=self.num_blocks)

    def reserve(self, num_blocks: int) -> None:
        """Have at least this many blocks; call only while none is in use."""
        assert not self._shared and not self._own
        if num_blocks <= self.num_blocks:
            return
        layers, kv_heads, dtype, device = self._layout
        self.num_blocks = num_blocks
        self.keys = self.values = torch.empty(0)  # free before allocating anew
        all_blocks = num_blocks + self._spare_blocks
        by_head = (layers, all_blocks, kv_heads, self.block)
        by_token = (layers, all_blocks, self.block, kv_heads)

        def zeros(*size: int) -> torch.Tensor:
            # Not empty, since a masked score times a value that is not a number would still be none.
            return torch.zeros(size, dtype=dtype, device=device)

        if self._token_major:
            self.keys = zeros(*by_token, self._key_dim).transpose(2, 3)
            self.values = zeros(*by_token, self._value_dim).transpose(2, 3)
        elif device.type == "cpu":  # keys with tokens side by side: many are scored at once
            self.keys = zeros(*by_head[:3], self._key_dim, self.block).transpose(3, 4)
            self.values = zeros(*by_head, self._value_dim)
        else:
            self.keys = zeros(*by_head, self._key_dim)
            self.values = zeros(*by_head, self._value_dim)
        self._free = set(range(num_blocks))
        self._lowest = list(range(num_blocks))
        self._highest = list(range(1 - num_blocks, 1))

    def take_shared(self, count: int) -> list[int]:
        """Take blocks for a prompt: the lowest free ones."""
        blocks = [self._take(self._lowest, 1) for _ in range(count)]
        self._shared.update(blocks)
        return blocks

    def take_own(self, count: int) -> list[int]:
        """Take blocks for one sample: the highest free ones."""
        blocks = [self._take(self._highest, -1) for _ in range(count)]
        self._own.update(blocks)
        return blocks

    def give_back(self, blocks: list[int]) -> None:
        """Free blocks of either kind."""
        for block in blocks:
            self._shared.discard(block)
            self._own.discard(block)
            self._free.add(block)
            heapq.heappush(self._lowest, block)
            heapq.heappush(self._highest, -block)

    def write(self, blocks: list[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write tokens [layers, kv heads, T, D] into the blocks, from the first one's start."""
        for index, block in enumerate(blocks):
            rows = slice(index * self.block, min((index + 1) * self.block, keys.shape[2]))
            self.keys[:, block, :, : rows.stop - rows.start] = keys[:, :, rows]
            self.values[:, block, :, : rows.stop - rows.start] = values[:, :, rows]

    def read(self, blocks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of whole blocks, each [layers, kv heads, T, D]."""
        keys = self.keys[:, blocks].transpose(1, 2).flatten(2, 3)
        values = self.values[:, blocks].transpose(1, 2).flatten(2, 3)
        return keys, values

    def _take(self, heap: list[int], sign: int) -> int:
        """Pop the nearest free block; entries of blocks that the other end took since are passed
        over."""
        assert self._free, "no block is free"
        while (block := sign * heapq.heappop(heap)) not in self._free:
            pass
        self._free.remove(block)
        return block


def _columns(shape: ModelConfig) -> tuple[int, int]:
    """Columns that the cache has of a key and of a value."""
    if shape.latent is None:
        return shape.head_dim, shape.head_dim
    return shape.latent.rope_dim, shape.latent.rank
