"""Prefix cache: prompts after their prefill, shared by the samples of their group.

A prompt whose blocks are given up for others runs anew when it is wanted again, through the experts
that its tokens went to the first time.
"""

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
    `fill`. `keeps_routes`: remember the experts of each token, until the prompt is dropped."""

    def __init__(self, decoder: Decoder, pool: BlockPool, max_tokens: int) -> None:
        self._decoder = decoder
        self._pool = pool
        self._max_tokens = max_tokens
        self._ready: dict[int, PromptCache] = {}
        self._begun: dict[int, KeyValues] = {}  # of a long prompt, the pieces that have run
        self.keeps_routes = False
        self._routes: dict[int, np.ndarray] = {}  # uint8 [tokens that have run, MoE layers, k]

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
            chunks.append(Chunk(piece, begun, self._known_routes(position, done, len(piece))))
            taken.append((position, len(tokens)))
            room -= len(piece)
        if not chunks:
            return
        for (position, length), chunk, extended in zip(
            taken, chunks, self._decoder.extend(chunks), strict=True
        ):
            self._keep_routes(position, chunk, extended.routes)
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

    def routes(self, position: int) -> np.ndarray | None:
        """The experts of all tokens of a prompt, uint8 [T, MoE layers, k]; None if they are not
        kept."""
        return self._routes.get(position)

    def drop(self, position: int) -> None:
        """Forget a prompt that nobody wants any more, and free its blocks."""
        self._evict(position)
        self._routes.pop(position, None)

    def drop_idle(self, but: int | None = None) -> bool:
        """Drop the last prompt that holds blocks and that no running sample uses; False if there is
        none."""
        idle = [
            position
            for position, cache in self._ready.items()
            if cache.shared and not cache.users and position != but
        ]
        if idle:
            self._evict(max(idle))
        return bool(idle)

    def _evict(self, position: int) -> None:
        """Free the blocks of a prompt; it will run anew if it is wanted again."""
        self._pool.give_back(self._ready.pop(position).shared)

    def _known_routes(self, position: int, begin: int, length: int) -> np.ndarray | None:
        """The experts of so many tokens of a prompt from `begin` on, if they have run before."""
        routes = self._routes.get(position)
        if routes is None or len(routes) <= begin:
            return None
        return routes[begin : begin + length]

    def _keep_routes(self, position: int, chunk: Chunk, routes: torch.Tensor | None) -> None:
        """Remember the experts of the tokens of a piece that ran for the first time."""
        if not self.keeps_routes or routes is None or chunk.routes is not None:
            return
        known = routes.cpu().numpy()
        if chunk.start:
            known = np.concatenate([self._routes[position], known])
        self._routes[position] = known

    def _keep(self, prompt: KeyValues, logits: torch.Tensor) -> PromptCache:
        """Write the whole blocks of a prompt: with blocks of 16, 37 tokens make 2, tail 5."""
        block = self._pool.block
        whole = prompt.length // block * block
        shared = self._pool.take_shared(whole // block)
        self._pool.write(shared, prompt.keys[:, :, :whole], prompt.values[:, :, :whole])
        tail = KeyValues(prompt.keys[:, :, whole:].clone(), prompt.values[:, :, whole:].clone())
        return PromptCache(prompt.length, shared, tail, logits.clone())
