"""The generation engine of one rollout replica: continuous batching over all samples of a step.

`submit` takes the replica's share of a batch; `collect` decodes until the groups of one minibatch
are complete, keeping every slot busy with later samples meanwhile. Every rank of the replica runs
the same scheduler on the same tokens, so tensor parallelism needs no commands between them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from r1zero.batch import Batch, Group, Sample
from r1zero.rollout.decoder import Decoder
from r1zero.rollout.kv_cache import PromptCache, SlotCache
from r1zero.rollout.sampler import Sampling, draw, uniforms
from r1zero.rollout.scheduler import Queue, Rows, Ticket

# Prompt tokens run in one prefill: enough to fill the device, little enough not to stall decoding.
PREFILL_TOKENS = 4096


class Engine:
    """Samples responses. `on_sample(group, sample)` is called as each sample is finished, `on_step()`
    after each decoding step, so that others can work while generation goes on."""

    def __init__(self, decoder: Decoder, sampling: Sampling, end_ids: tuple[int, ...], budget: int,
                 max_running: int | None, max_tokens: int, replica: int, num_replicas: int) -> None:
        self.decoder, self.sampling, self.budget = decoder, sampling, budget
        self.max_running, self.max_tokens = max_running, max_tokens
        self.replica, self.num_replicas = replica, num_replicas
        self.version = -1  # of the weights in the decoder; publishing sets it
        self.decoded_tokens = 0
        self._end_ids = np.asarray(sorted(end_ids))
        self._cache = SlotCache(decoder.shape, decoder.kv_heads, decoder.dtype, decoder.device)
        self._queue, self._rows = Queue(), Rows(0, budget)
        self._batch: Batch | None = None
        self._groups: dict[int, Group] = {}
        self._missing: dict[int, int] = {}  # members of a group without a slot; its prompt cache goes at 0
        self._open: dict[int, int] = {}  # members of a group not finished
        self._prompts: dict[int, PromptCache] = {}
        self.on_sample: Callable[[Group, int], None] = lambda group, member: None
        self.on_step: Callable[[], None] = lambda: None

    def submit(self, batch: Batch) -> None:
        """Queue this replica's share of a batch: the prompts at positions p % replicas == replica."""
        assert not any(self._open.values()), "the last batch is not collected yet"
        assert batch.version == self.version, f"weights {self.version} cannot draw batch {batch.version}"
        self._batch, size = batch, batch.samples_per_prompt
        mine = range(self.replica, len(batch.prompts), self.num_replicas)
        self._groups = {p: Group(p, batch.prompts[p], [None] * size) for p in mine}
        self._missing, self._open = dict.fromkeys(mine, size), dict.fromkeys(mine, size)
        self._queue.extend([Ticket(p, member) for p in mine for member in range(size)])
        self._reserve(batch, len(mine) * size)

    def collect(self, minibatch: int) -> list[Group]:
        """Decode until this replica's groups of the minibatch are complete, and hand them out."""
        assert self._batch is not None
        positions = [p for p in self._batch.arrivals(minibatch) if p in self._groups]
        while any(self._open[p] for p in positions):
            self._step()
        return [self._groups[p] for p in positions]

    # -- one step -------------------------------------------------------------------------------

    def _step(self) -> None:
        """Admit what fits, then draw one more token for every running sample."""
        self._admit()
        rows = self._rows
        if rows.count:
            positions = rows.lengths[:rows.count].copy()
            logits = self.decoder.decode(
                self._tensor(rows.last_tokens()), self._tensor(positions), int(positions.max()) + 1, self._cache)
            rows.lengths[:rows.count] += 1
            self._draw(np.arange(rows.count), logits)
        self.on_step()

    def _admit(self) -> None:
        """Give free slots to waiting samples, running the prompts that are new in as few passes as can be."""
        rows = self._rows
        tickets = self._queue.take(rows.slots - rows.count)
        if not tickets:
            return
        self._prefill([p for p in dict.fromkeys(t.position for t in tickets) if p not in self._prompts])
        first, logits = rows.count, []
        for ticket in tickets:
            prompt = self._prompts[ticket.position]
            row = rows.add(ticket, prompt.keys.shape[2], uniforms(
                self.sampling.seed, self._batch.step, ticket.position, ticket.member, self.budget))
            self._cache.admit(row, prompt)
            logits.append(prompt.logits)
            self._missing[ticket.position] -= 1
            if not self._missing[ticket.position]:
                del self._prompts[ticket.position]
        self._draw(np.arange(first, rows.count), torch.stack(logits))

    def _prefill(self, positions: list[int]) -> None:
        while positions:
            count, total = 0, 0
            for position in positions:
                total += len(self._groups[position].prompt.tokens)
                if count and total > PREFILL_TOKENS:
                    break
                count += 1
            now, positions = positions[:count], positions[count:]
            prompts = [self._groups[p].prompt.tokens for p in now]
            caches = self.decoder.prefill(
                self._tensor(np.concatenate(prompts)), self._tensor(np.concatenate([np.arange(len(t)) for t in prompts])),
                np.cumsum([len(t) for t in prompts]).tolist())
            self._prompts.update(zip(now, caches, strict=True))

    def _draw(self, numbers: np.ndarray, logits: torch.Tensor) -> None:
        """Draw the next token of these rows and let finished samples go."""
        rows = self._rows
        uniform = torch.from_numpy(rows.next_uniforms(numbers)).to(logits.device)
        drawn, logprobs = draw(logits, uniform, self.sampling, self.decoder.group)
        tokens = drawn.cpu().numpy()
        rows.record(numbers, tokens, logprobs.cpu().numpy())
        self.decoded_tokens += len(numbers)
        ended = np.isin(tokens, self._end_ids)
        done = ended | (rows.generated[numbers] == self.budget)
        for at in np.flatnonzero(done)[::-1]:  # from the back: freeing a row moves the last one into it
            self._finish(int(numbers[at]), truncated=not ended[at])

    def _finish(self, row: int, truncated: bool) -> None:
        rows, ticket = self._rows, self._rows.tickets[row]
        count = rows.generated[row]
        group = self._groups[ticket.position]
        group.samples[ticket.member] = Sample(
            rows.tokens[row, :count].copy(), rows.logprobs[row, :count].copy(), bool(truncated), self._batch.version)
        self._open[ticket.position] -= 1
        moved = rows.remove(row)
        if moved is not None:
            self._cache.move(moved, row, int(rows.lengths[row]))
        self.on_sample(group, ticket.member)

    def _reserve(self, batch: Batch, wanted: int) -> None:
        """Size the slots: as many samples as fit into `max_tokens` at their full length."""
        capacity = max(len(prompt.tokens) for prompt in batch.prompts) + self.budget
        slots = max(1, min(wanted, self.max_tokens // capacity, self.max_running or wanted))
        self._cache.reserve(slots, capacity)
        self._rows = Rows(slots, self.budget)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.decoder.device)
