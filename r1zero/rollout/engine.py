"""The native rollout engine: continuous batching over all samples of a step, one replica.

`submit` takes the replica's share of a batch; `collect` decodes until the groups of one part are
complete, keeping every row busy with all other samples meanwhile. Every rank of the replica runs
the same scheduler on the same tokens, so tensor parallelism needs no commands between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from r1zero.models.layout import WeightLayout, WeightTarget
from r1zero.rollout.block_attention import DecodeLayout, DecodeStep
from r1zero.rollout.decoder import Chunk, Decoder
from r1zero.rollout.expert_replicas import ExpertReplicas
from r1zero.rollout.interface import EngineListener, EngineSetup, RolloutProgress, Sampling
from r1zero.rollout.kv_cache import BlockPool, SampleBlocks
from r1zero.rollout.prompts import PromptCache, PromptCaches
from r1zero.rollout.sampler import uniforms
from r1zero.rollout.scheduler import PartialSample, Queue, RunningBatch, SampleId
from r1zero.types import Batch, Group, Part, Sample


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How much the native engine may hold and do at once."""

    budget: int  # response tokens of a sample
    max_tokens: int  # of KV cache, in tokens
    max_running: int | None = None  # samples decoded together; None: as many as the cache can hold
    # of prompts between two decoding steps, so that prompts do not stall samples
    prefill_tokens: int = 4096
    block: int | None = None  # tokens of a cache block; None: what suits the device


@dataclass(frozen=True, slots=True)
class _Request:
    """What is being generated."""

    batch: Batch
    sampling: Sampling
    budgets: np.ndarray  # int [P, G], response tokens of each sample at most


# Of an engine that was asked for nothing yet.
_NOTHING = _Request(Batch(0, -1, [], 1, 1), Sampling(1.0, 1.0, 0, 0), np.zeros((0, 1), int))


class NativeEngine:
    """A `RolloutEngine` in Megatron's weight layout, cut by the rollout role's TP."""

    layout: ClassVar[WeightLayout] = WeightLayout(names="megatron", cut=True)

    @classmethod
    def build(cls, setup: EngineSetup) -> NativeEngine:
        """Make an engine without weights. BadInput when TP does not divide the model."""
        replicas = None
        if setup.grid.span.experts_span_replicas:
            replicas = ExpertReplicas(setup.grid)
        graphs = setup.config.graphs
        if graphs is None:
            graphs = setup.device.type == "npu"
        decoder = Decoder(
            setup.shape,
            setup.grid.span.tp,
            setup.grid.groups["tp"],
            setup.dtype,
            setup.device,
            setup.config.max_length,
            graphs=graphs,
            unused=setup.unused,
            replicas=replicas,
        )
        limits = EngineLimits(
            setup.config.max_response, setup.config.max_cache_tokens, setup.config.max_running
        )
        return cls(decoder, setup.end_ids, limits)

    def __init__(self, decoder: Decoder, end_ids: tuple[int, ...], limits: EngineLimits) -> None:
        self.decoder = decoder
        self.limits = limits
        self.version = -1  # of the weights in the decoder, as they came; it signs every sample
        self.listeners: list[EngineListener] = []
        self.preemptions = 0
        self._tokens = 0  # response tokens of this request, as drawn
        self._target = WeightTarget(self.layout, decoder.weights, self._commit)
        self._end_ids = np.asarray(sorted(end_ids))
        self._pool = BlockPool(
            decoder.shape,
            decoder.kv_heads,
            decoder.dtype,
            decoder.device,
            limits.block,
            token_major=decoder.operators.token_major,
            spare=decoder.padding,
        )
        self._caches = PromptCaches(decoder, self._pool, limits.prefill_tokens)
        self._routes_of_token: tuple[int, int] | None = None  # kept, in MoE layers and experts
        self._queue = Queue()
        self._rows = RunningBatch(0)
        self._layout: DecodeLayout | None = None  # None: rows or blocks have changed since
        self._request = _NOTHING
        self._groups: dict[int, Group] = {}
        self._open: dict[int, int] = {}  # members of a group that are not finished
        self._longest: dict[int, int] = {}  # tokens of a group's longest response that does not run

    def submit(
        self,
        batch: Batch,
        positions: Sequence[int],
        sampling: Sampling,
        budgets: np.ndarray | None = None,
    ) -> None:
        """Queue the samples of the prompts at these positions; see `RolloutEngine`."""
        assert not any(self._open.values()), "the request before is not collected yet"
        size = batch.samples_per_prompt
        if budgets is None:
            budgets = np.full((len(batch.prompts), size), self.limits.budget)
        assert budgets.min() > 0 and budgets.max() <= self.limits.budget, "budgets out of bounds"
        self._request = _Request(batch, sampling, budgets)
        self._keep_routes(batch.keeps_routes)
        self._tokens = 0
        self._groups = {p: Group.begun(p, batch.prompts[p], size) for p in positions}
        self._open = dict.fromkeys(positions, size)
        self._longest = dict.fromkeys(positions, 0)
        for position in positions:
            for member in range(size):
                self._queue.put(SampleId(position, member))
        self._reserve(len(positions), size)

    @torch.inference_mode()
    def collect(self, part: Part) -> list[Group]:
        """Decode until the groups of the part are complete, keeping rows busy with all others."""
        positions = [p for p in part.positions if p in self._groups]
        while self._advance(self._undecided(positions, part)):
            for listener in self.listeners:
                listener.on_step()
        complete = [self._groups[p] for p in positions if not self._open[p]]
        return [group for group in complete if group.longest in part.lengths]

    def progress(self) -> RolloutProgress:
        """How far the request is."""
        total = len(self._groups) * self._request.batch.samples_per_prompt
        done = total - sum(self._open.values())
        longest = max((sequence.count for sequence in self._rows.sequences), default=0)
        return RolloutProgress(done, total, longest, self._tokens)

    def weights(self) -> WeightTarget:
        """The decoder's weights."""
        return self._target

    def _commit(self, version: int) -> None:
        """Take note that weights of this version were written to the decoder."""
        assert not any(self._open.values()), (
            "weights may not change while samples are drawn with them"
        )
        self.decoder.prepare()
        self.version = version

    def _undecided(self, positions: Sequence[int], part: Part) -> bool:
        """Whether a group at these positions may still turn out to belong to the part: it is not
        complete, and none of its responses is too long for it."""
        waits = {p for p in positions if self._open[p] and self._longest[p] < part.lengths.stop}
        for sequence in self._rows.sequences:
            if sequence.count >= part.lengths.stop:
                waits.discard(sequence.sample_id.position)
        return bool(waits)

    # -- one step -------------------------------------------------------------------------------

    def _advance(self, waits: bool) -> bool:
        """Draw a token of each running sample, if a part `waits` for one. False when none does, nor
        any of a replica with which this one shares experts.

        Such a replica cannot run a pass alone. While it goes on, this one draws samples of later
        parts; where it has none, its experts serve.
        """
        replicas = self.decoder.replicas
        if replicas is not None:
            replicas.waits = waits
            waits = waits or (replicas.anyone_waits and any(self._open.values()))
        if not waits:
            return self.decoder.serve()
        self._admit()
        if self._rows.count:
            self._append_block()
            self._decode()
        return True

    def _admit(self) -> None:
        """Give rows to waiting samples in order, as far as rows, blocks and finished prompts go."""
        rows = self._rows
        wanted = self._queue.first(rows.size - rows.count)
        if not wanted:
            return
        self._make_room(wanted[0])
        wanted = self._affordable(wanted)
        positions = dict.fromkeys(sample_id.position for sample_id in wanted)
        self._caches.fill([(p, self._groups[p].prompt.tokens) for p in positions])
        fresh: list[int] = []
        for sample_id in wanted:
            prompt = self._caches.get(sample_id.position)
            if prompt is None:  # a long one of which more pieces must run
                break
            _, begun = self._queue.take()
            blocks = self._pool.take_own(self._blocks_to_start(sample_id, begun))
            if begun is None:
                uniform = self._uniforms(sample_id)
                begun = PartialSample.fresh(sample_id, uniform, self._routes_of_token)
                fresh.append(rows.count)
            self._restore(begun, prompt, blocks)
            rows.add(begun, prompt.length + max(begun.count - 1, 0), blocks)
            prompt.users += 1
            self._layout = None
        if fresh:
            logits = [self._prompt(row).logits for row in fresh]
            self._sample(fresh, torch.stack(logits))

    def _append_block(self) -> None:
        """Give a block to every row whose last one is full, taking from the last rows if none is
        free."""
        rows = self._rows
        block = self._pool.block
        needy = [
            rows.sequences[row].sample_id
            for row in range(rows.count)
            if rows.lengths[row] == (len(self._prompt(row).shared) + len(rows.blocks[row])) * block
        ]
        for sample_id in sorted(needy):
            while not self._pool.num_free and self._row_of(sample_id) is not None:
                if not self._caches.drop_idle():
                    self._preempt(rows.last())
            row = self._row_of(sample_id)
            if row is not None:  # else it was the last one itself, or made way for an earlier one
                rows.blocks[row] += self._pool.take_own(1)
                self._layout = None

    def _row_of(self, sample_id: SampleId) -> int | None:
        running = enumerate(self._rows.sequences)
        return next((row for row, sequence in running if sequence.sample_id == sample_id), None)

    def _decode(self) -> None:
        """Draw one more token for every running sample."""
        rows = self._rows
        if self._layout is None:
            where = [
                SampleBlocks(
                    rows.sequences[row].sample_id.position,
                    self._prompt(row).shared,
                    rows.blocks[row],
                )
                for row in range(rows.count)
            ]
            self._layout = DecodeLayout(
                where,
                self._pool,
                self._request.batch.samples_per_prompt,
                self.decoder.heads,
                self.decoder.device,
            )
        positions = rows.lengths[: rows.count]
        step = DecodeStep(self._layout, positions)
        decoded = self.decoder.decode(rows.newest[: rows.count], step)
        if self._routes_of_token is not None:
            assert decoded.routes is not None, "a model with experts has routes"
            rows.record_routes(decoded.routes.cpu().numpy())
        positions += 1
        self._sample(list(range(rows.count)), decoded.logits)

    def _sample(self, numbers: list[int], logits: torch.Tensor) -> None:
        """Draw the next token of these rows, in ascending order, and let finished samples go."""
        rows = self._rows
        uniform = torch.from_numpy(rows.uniforms(numbers)).to(logits.device)
        drawn, logprobs = self.decoder.operators.sample(
            logits, uniform, self._request.sampling, self.decoder.group
        )
        tokens = drawn.cpu().numpy()
        rows.record(numbers, tokens, logprobs.cpu().numpy())
        self._tokens += len(numbers)
        ended = np.isin(tokens, self._end_ids)
        # from the back: freeing a row moves the last one into it
        for at in range(len(numbers) - 1, -1, -1):
            sequence = rows.sequences[numbers[at]]
            if ended[at] or sequence.count == len(sequence.tokens):
                self._finish(numbers[at], truncated=not ended[at])

    # -- coming and going -----------------------------------------------------------------------

    def _finish(self, row: int, truncated: bool) -> None:
        sequence = self._release(row)
        position = sequence.sample_id.position
        member = sequence.sample_id.member
        count = sequence.count
        routes = sequence.known_routes
        group = self._groups[position]
        group.samples[member] = Sample(
            sequence.tokens[:count].copy(),
            sequence.logprobs[:count].copy(),
            bool(truncated),
            self.version,
            loss_mask=np.ones(count, dtype=bool),
            routes=None if routes is None else routes.copy(),
        )  # the policy drew every token itself
        self._open[position] -= 1
        if not self._open[position]:
            group.prompt_routes = self._caches.routes(position)
            self._caches.drop(position)
        for listener in self.listeners:
            listener.on_sample(group, member)

    def _preempt(self, row: int) -> None:
        """Let a sample wait again with the tokens it has; its keys are computed anew when its turn
        comes."""
        sequence = self._release(row)
        self._queue.put(sequence.sample_id, sequence)
        self.preemptions += 1

    def _release(self, row: int) -> PartialSample:
        self._prompt(row).users -= 1
        sequence, blocks = self._rows.remove(row)
        position = sequence.sample_id.position
        self._longest[position] = max(self._longest[position], sequence.count)
        self._pool.give_back(blocks)
        self._layout = None
        return sequence

    def _restore(self, sequence: PartialSample, prompt: PromptCache, blocks: list[int]) -> None:
        """Fill a new row's own blocks: the rest of its prompt, and what it drew before its newest
        token."""
        own = prompt.tail
        if sequence.count > 1:
            before = self._caches.read(prompt)
            tokens = sequence.tokens[: sequence.count - 1]
            drawn = Chunk(tokens, before, sequence.known_routes)
            [again] = self.decoder.extend([drawn])
            own = own.then(again.new)
        self._pool.write(blocks, own.keys, own.values)

    def _affordable(self, wanted: list[SampleId]) -> list[SampleId]:
        """Those of the first that wait for which there are blocks, leaving some for the growth of
        what runs: else a sample would start only to be preempted."""
        free = self._pool.num_free - min(self._rows.count, self._pool.num_blocks // 8)
        new: set[int] = set()
        for number, sample_id in enumerate(wanted):
            free -= self._blocks_to_start(sample_id, self._queue.begun(sample_id))
            if self._caches.get(sample_id.position) is None and sample_id.position not in new:
                new.add(sample_id.position)
                free -= len(self._groups[sample_id.position].prompt.tokens) // self._pool.block
            if free < 0:
                return wanted[:number]
        return wanted

    def _make_room(self, sample_id: SampleId) -> None:
        """Let the first that waits start, if need be at the cost of prompts that nobody uses."""
        while not self._affordable([sample_id]) and self._caches.drop_idle(but=sample_id.position):
            pass

    def _blocks_to_start(self, sample_id: SampleId, begun: PartialSample | None) -> int:
        """Own blocks for the rest of the prompt, what was drawn before, and the next token."""
        tail = len(self._groups[sample_id.position].prompt.tokens) % self._pool.block
        return (tail + (begun.count - 1 if begun else 0)) // self._pool.block + 1

    def _reserve(self, num_prompts: int, group_size: int) -> None:
        """Size rows and blocks: what the samples need at most, within the limits, but room for
        one."""
        limits = self.limits
        block = self._pool.block
        lengths = [len(group.prompt.tokens) for group in self._groups.values()] or [1]
        longest = max(lengths) + limits.budget
        one = -(-longest // block)
        own = -(-limits.budget // block) + 1
        most = sum(length // block for length in lengths) + num_prompts * group_size * own
        self._pool.reserve(max(one, min(most, limits.max_tokens // block)))
        samples = max(1, num_prompts * group_size)
        self._rows = RunningBatch(
            min(samples, limits.max_running or samples, self._pool.num_blocks)
        )
        self._layout = None

    def _prompt(self, row: int) -> PromptCache:
        prompt = self._caches.get(self._rows.sequences[row].sample_id.position)
        assert prompt is not None, "a sample runs while its prompt is not in the cache"
        return prompt

    def _keep_routes(self, wanted: bool) -> None:
        """Keep the experts of each token from now on, or do not."""
        experts = self.decoder.shape.experts
        self._routes_of_token = None
        if wanted and experts is not None:
            self._routes_of_token = (len(experts.layers), experts.top_k)
        self._caches.keeps_routes = self._routes_of_token is not None

    def _uniforms(self, sample_id: SampleId) -> np.ndarray:
        position = sample_id.position
        member = sample_id.member
        budget = int(self._request.budgets[position, member])
        request = self._request
        return uniforms(request.sampling.seed, *request.batch.random_key(position), member, budget)
