"""Prefix cache: prompts after their prefill, shared by the samples of their group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from r1zero.rollout.decoder import Chunk, Decoder
from r1zero.rollout.kv_cache import BlockPool


@dataclass(slots=True)
class PromptCache:
    """One prompt: its whole blocks, what is left over, and the logits that start every response."""

    length: int
    shared: list[int]
    # [layers, kv heads, length % block, D], copied into each member's first block
    tail_keys: torch.Tensor
    tail_values: torch.Tensor
    logits: torch.Tensor  # [V / TP]
    users: int = 0  # running samples


@dataclass(frozen=True, slots=True)
class _Begun:
    """A long prompt of which some pieces have run."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[2]


class PromptCaches:
    """The prompts of a batch by position. At most `max_tokens` prompt tokens run in one call of
    `fill`."""

    def __init__(self, decoder: Decoder, pool: BlockPool, max_tokens: int) -> None:
        self._decoder = decoder
        self._pool = pool
        self._max_tokens = max_tokens
        self._ready: dict[int, PromptCache] = {}
        self._begun: dict[int, _Begun] = {}

    def get(self, position: int) -> PromptCache | None:
        """The cache of a prompt that has run whole."""
        return self._ready.get(position)

    def fill(self, prompts: Sequence[tuple[int, np.ndarray]]) -> None:
        """Run those of these (position, tokens) that are new, in order; of a long prompt the next
        piece."""
        room = self._max_tokens
        chunks = []
        taken = []
        for position, tokens in prompts:
            if position in self._ready:
                continue
            if room <= 0:
                break
            begun = self._begun.get(position)
            done = begun.length if begun else 0
            piece = tokens[done : done + room]
            chunks.append(Chunk(piece, done, begun and begun.keys, begun and begun.values))
            taken.append((position, len(tokens)))
            room -= len(piece)
        if not chunks:
            return
        for (position, length), chunk, new in zip(
            taken, chunks, self._decoder.extend(chunks), strict=True
        ):
            keys = new.keys
            values = new.values
            if chunk.start:
                keys = torch.cat([chunk.keys, keys], dim=2)
                values = torch.cat([chunk.values, values], dim=2)
            if keys.shape[2] < length:
                self._begun[position] = _Begun(keys, values)
            else:
                self._begun.pop(position, None)
                self._ready[position] = self._keep(keys, values, new.logits)

    def read(self, prompt: PromptCache) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of a prompt, each [layers, kv heads, length, D]."""
        if not prompt.shared:
            return prompt.tail_keys, prompt.tail_values
        keys, values = self._pool.read(prompt.shared)
        return torch.cat([keys, prompt.tail_keys], dim=2), torch.cat(
            [values, prompt.tail_values], dim=2
        )

    def drop(self, position: int) -> None:
        """Forget a prompt and free its blocks; it will run anew if it is wanted again."""
        self._pool.give_back(self._ready.pop(position).shared)

    def drop_idle(self, but: int | None = None) -> bool:
        """Drop the last prompt that holds blocks and that no running sample uses; False if there is
        none."""
        idle = [
            position
            for position, cache in self._ready.items()
            if cache.shared and not cache.users and position != but
        ]
        if idle:
            self.drop(max(idle))
        return bool(idle)

    def _keep(self, keys: torch.Tensor, values: torch.Tensor, logits: torch.Tensor) -> PromptCache:
        length = keys.shape[2]
        whole = length // self._pool.block * self._pool.block
        shared = self._pool.take_shared(whole // self._pool.block)
        self._pool.write(shared, keys[:, :, :whole], values[:, :, :whole])
        tail_keys = keys[:, :, whole:].clone()
        tail_values = values[:, :, whole:].clone()
        return PromptCache(length, shared, tail_keys, tail_values, logits.clone())
