"""Keys and values of the samples in flight, and of prompts whose group still waits for slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from r1zero.model import ModelShape


@dataclass(slots=True)
class PromptCache:
    """A prompt after its prefill; shared by its group until all members have a slot."""

    keys: torch.Tensor  # [layers, kv heads, prompt tokens, D]
    values: torch.Tensor
    logits: torch.Tensor  # fp32 [V / TP], for the first token of each member


class SlotCache:
    """One row of keys and values per running sample, rows [0, running) in use.

    A (row, kv head) pair's keys are contiguous, which is what batched products want.
    """

    def __init__(self, shape: ModelShape, kv_heads: int, dtype: torch.dtype, device: torch.device) -> None:
        self._layers, self._kv_heads, self._head_dim = shape.num_layers, kv_heads, shape.head_dim
        self._dtype, self._device = dtype, device
        self.slots = self.capacity = 0
        self.keys = self.values = torch.empty(0)

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def reserve(self, slots: int, capacity: int) -> None:
        """Make room for `slots` samples of `capacity` tokens each, keeping a large enough buffer."""
        if slots <= self.slots and capacity <= self.capacity:
            return
        self.slots, self.capacity = max(slots, self.slots), max(capacity, self.capacity)
        shape = (self._layers, self.slots, self._kv_heads, self.capacity, self._head_dim)
        self.keys = self.values = torch.empty(0)  # free before allocating anew
        self.keys = torch.zeros(shape, dtype=self._dtype, device=self._device)
        self.values = torch.zeros(shape, dtype=self._dtype, device=self._device)

    def admit(self, row: int, prompt: PromptCache) -> None:
        """Start a row with its prompt."""
        length = prompt.keys.shape[2]
        self.keys[:, row, :, :length] = prompt.keys
        self.values[:, row, :, :length] = prompt.values

    def move(self, source: int, target: int, length: int) -> None:
        """Move a row of `length` tokens into a free one."""
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]
