"""Planning of global batches: which prompts a step draws, in which parts and rounds they travel.

Only the controller plans. A plan follows from the stream of prompts and from what earlier steps told
of lengths and kept groups, all of which a checkpoint holds; so a resumed run draws the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from r1zero.algo.dealing import SampleTable
from r1zero.algo.parts import plan_parts, shifted
from r1zero.algo.rounds import round_size
from r1zero.config.schema import Config
from r1zero.data.expected_lengths import ExpectedLengths
from r1zero.data.prompts import Prompts
from r1zero.data.tail_batching import Draw, TailBatching
from r1zero.types import Batch, Drawn, Part, Prompt

log = logging.getLogger("r1zero")

TAIL = "tail/"  # before the names of what tail batching keeps in a checkpoint


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a run stands when it draws a batch."""

    version: int  # of the weights that draw it
    reference_version: int | None
    start: int  # position in the stream of prompts
    ahead: int  # batches that are drawn and not yet learnt from
    last: Drawn  # by the last step


class BatchPlanner:
    """Plans the batches of a run."""

    def __init__(
        self, config: Config, prompts: Prompts, replicas: int, keeps_routes: bool = False
    ) -> None:
        """`replicas` of rollout share a batch, and tell which experts tokens went to if it
        `keeps_routes`."""
        self._config = config
        self._prompts = prompts
        self._replicas = replicas
        self._keeps_routes = keeps_routes
        self._lengths = ExpectedLengths()
        self._tail: TailBatching | None = None
        if config.training.tail_batching is not None:
            self._tail = TailBatching(config.training.tail_batching)

    def draw(self, step: int, now: Standing) -> Batch:
        """Plan the batch that step 1, 2, ... learns from."""
        config = self._config
        training = config.training
        count = training.global_batch_size
        draw = Draw(count)
        pool = None
        if self._tail is not None:
            draw = self._tail.draw(count, config.response_budget)
        if config.algorithm.equal_groups == "replace":
            pool = count
            draw = Draw(round_size(count, now.last.kept, now.last.groups))
        prompts = self._prompts.draw(now.start, draw.fresh)
        if training.minibatch_order == "expected_length":
            prompts = self._lengths.order(prompts)
        prompts += self._prompts.find([late.index for late in draw.put_off])
        if draw.limit is not None:
            pool = len(prompts)  # of those that end all
        return Batch(
            step,
            now.version,
            prompts,
            config.actor_rollout.n_samples_per_prompt,
            config.minibatch_size,
            config.actor_rollout.ppo_epochs,
            training.updates == "accumulate",
            self._parts(range(len(prompts)), draw),
            staleness=now.ahead,
            reference_version=now.reference_version,
            response_limit=draw.limit,
            keeps_routes=self._keeps_routes,
            first_draws=draw.first_draws,
            pool=pool,
            most_rounds=config.algorithm.max_rounds if draw.limit is None and pool else 1,
        )

    def draw_more(self, batch: Batch, known: SampleTable, start: int) -> Batch:
        """Plan another round of the batch for what is missing in its pool; without positions when
        nothing is. `known` are all groups so far; the batch began at position `start` of the
        stream."""
        assert batch.pool is not None
        first = len(batch.prompts)
        kept = int(known.kept.sum())
        more: list[Prompt] = []
        if kept < batch.pool:
            count = round_size(batch.pool - kept, kept, first)
            more = self._prompts.draw(start + first, count)
        return replace(
            batch,
            prompts=[*batch.prompts, *more],
            planned_parts=self._parts(range(first, first + len(more)), Draw(len(more))),
            first=first,
            round=batch.round + 1,
        )

    def record(self, batch: Batch, known: SampleTable) -> None:
        """Take what a step brought: of all its groups."""
        ended = np.flatnonzero(~known.put_off).tolist()
        prompts = [batch.prompts[position] for position in ended]
        self._lengths.record(prompts, known.lengths[ended].tolist())
        if self._tail is not None:
            self._tail.record(batch, known.lengths, known.put_off)

    @property
    def waiting(self) -> int:
        """Prompts that are put off, and still to be answered."""
        return self._tail.waiting if self._tail is not None else 0

    def state(self) -> dict[str, np.ndarray]:
        """What it goes on from, as arrays for a checkpoint."""
        state = self._lengths.state()
        if self._tail is not None:
            state |= {TAIL + name: array for name, array in self._tail.state().items()}
        return state

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from `state`, in which one part or the other may be missing."""
        self._lengths.restore(state)
        of_tail = {name.removeprefix(TAIL): state[name] for name in state if name.startswith(TAIL)}
        if not of_tail:
            return
        tail = self._tail or TailBatching(1.0)
        tail.restore(of_tail, self._prompts.indices)
        if self._tail is None and tail.waiting:
            log.warning(
                "warning: %d prompts were put off and are not answered, as training.tail_batching is "
                "null now",
                tail.waiting,
            )

    def _parts(self, positions: range, draw: Draw) -> tuple[Part, ...]:
        """Plan the parts of a round with these positions.

        A replica runs as many responses at a time as its cache can hold, if all were as long as they
        were in the last step, or half as long as they may be.
        """
        config = self._config
        training = config.training
        actor = config.actor_rollout
        budget = draw.limit or config.response_budget
        longest = min(budget, self._lengths.longest(budget))
        if draw.put_off:
            longest = budget  # as long as they may be: that is why they were put off
        prompts = len(positions)
        on_a_replica = -(-prompts // self._replicas)
        samples = on_a_replica * actor.n_samples_per_prompt
        rows = max(1, actor.max_tokens_to_oom // self._lengths.typical(budget // 2))
        if actor.max_running_samples is not None:
            rows = min(rows, actor.max_running_samples)
        rounds = -(-samples // rows)
        minibatches = None
        if training.updates == "per_minibatch" and not training.staleness:
            drawn = prompts * actor.n_samples_per_prompt
            minibatches = max(1, drawn // actor.ppo_mini_batch_size)
        parts = plan_parts(prompts, config.parts, rounds, minibatches, longest)
        return shifted(parts, positions.start)
