"""Prefix cache: prompts after their prefill, shared by the samples of their group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from r1zero.rollout.decoder import Chunk, Decoder, KeyValues
from r1zero.rollout.kv_cache import BlockPool


@dataclass(slots=True)
class PromptCache:
    """One prompt: its whole blocks, what is left over, and the logits that start every response."""

    length: int
    shared: list[int]
    tail: KeyValues  # of the last length % block tokens, copied into each member's first block
    logits: torch.Tensor  # [V / TP]
    users: int = 0  # running samples


class PromptCaches:
    """The prompts of a batch by position. At most `max_tokens` prompt tokens run in one call of
    `fill`."""

    def __init__(self, decoder: Decoder, pool: BlockPool, max_tokens: int) -> None:
        self._decoder = decoder
        self._pool = pool
        self._max_tokens = max_tokens
        self._ready: dict[int, PromptCache] = {}
        self._begun: dict[int, KeyValues] = {}  # of a long prompt, the pieces that have run

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
            chunks.append(Chunk(piece, begun))
            taken.append((position, len(tokens)))
            room -= len(piece)
        if not chunks:
            return
        for (position, length), chunk, extended in zip(
            taken, chunks, self._decoder.extend(chunks), strict=True
        ):
            whole = extended.new
            if chunk.before is not None:
                whole = chunk.before.then(whole)
            if whole.length < length:
                self._begun[position] = whole
            else:
                self._begun.pop(position, None)
                self._ready[position] = self._keep(whole, extended.logits)

    def read(self, prompt: PromptCache) -> KeyValues:
        """All keys and values of a prompt."""
        if not prompt.shared:
            return prompt.tail
        shared = KeyValues(*self._pool.read(prompt.shared))
        return shared.then(prompt.tail)

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

    def _keep(self, prompt: KeyValues, logits: torch.Tensor) -> PromptCache:
        """Write the whole blocks of a prompt: with blocks of 16, 37 tokens make 2, tail 5."""
        block = self._pool.block
        whole = prompt.length // block * block
        shared = self._pool.take_shared(whole // block)
        self._pool.write(shared, prompt.keys[:, :, :whole], prompt.values[:, :, :whole])
        tail = KeyValues(prompt.keys[:, :, whole:].clone(), prompt.values[:, :, whole:].clone())
        return PromptCache(prompt.length, shared, tail, logits.clone())
