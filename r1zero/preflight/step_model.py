"""A model of one step: what every role does when, from lengths of responses and a few rates.

    rollout replica  decodes its rows together; hands part 0 over when it knows it, then part 1 ...
    ref replica      takes part k when it is free and every rollout replica has handed it over
    train replicas   take part k together when they are free and every ref replica has handed it over

Without a reference train takes over from rollout. A reward model's replicas take a part as ref's do;
what they say of it is there for the next role when they are done and the next part is known.

So the page of step.py, with work in place of moves. A part is planned before generation: the groups
at some positions of the batch whose longest response has a length in some range. It is known when
every group at its positions has ended or is longer. Three groups of one response, of 2, 5 and 9
tokens, decoded together at a second a token; the parts are lengths 1 to 4, and from 5 on:

    part 0 is known after 5 s: the first group ended after 2 s, the others are 5 tokens long by then
    part 1 is known after 9 s

A decode step takes a time of its own and a little more for each row. Not in the model: the network
(but for publishing), stragglers, rewards (they run beside), host code, evaluation, checkpoints. All
it says is a prediction; trust the ratios of two of its steps more than their seconds.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from r1zero.algo.parts import plan_parts
from r1zero.config.schema import DEFAULT_PARTS
from r1zero.data.expected_lengths import ExpectedLengths
from r1zero.distributed.placement import Placement, RankGrid
from r1zero.types import ANY_LENGTH, Part, Prompt

# Of the logarithm of a prompt's longest response, how far an expectation of it is off: a guess.
EXPECTATION_ERROR = 0.4
DRAWS = 4  # batches whose mean is a prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The batch of a step, and how it is worked on. The options are those of `training`."""

    prompts: int
    group_size: int  # responses of a prompt
    minibatch_size: int  # responses between two optimizer steps
    prompt_tokens: float  # of one prompt, on average
    longest: int  # tokens that a response may have
    microbatch: float = 1  # responses in one pass of a train replica, on average
    ref_microbatch: float = 1
    reward_microbatch: float = 1  # of a reward model
    epochs: int = 1
    cache_tokens: int = ANY_LENGTH  # that a rollout replica can hold
    max_running: int | None = None  # rows that it decodes at a time, at most
    updates: Literal["per_minibatch", "accumulate"] = "per_minibatch"
    minibatch_order: Literal["drawn", "expected_length"] = "drawn"
    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    staleness: int = 0
    parts: int = DEFAULT_PARTS  # in which the batch travels, at most

    @property
    def num_minibatches(self) -> int:
        return self.prompts * self.group_size // self.minibatch_size

    @property
    def looks_back(self) -> bool:
        """Whether old log-probs are recomputed once weights have changed within the step."""
        return self.old_logprobs == "recompute" and self.updates == "per_minibatch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How long one replica of a role takes, in seconds."""

    decode_step: float  # of a rollout replica, whatever its rows
    decode_row: float  # more for each row
    prefill: float  # for a token of a prompt, once for its group
    ref: float  # for a token
    reward: float = 0.0  # for a token, of a reward model
    learn: float  # for a token: forward and backward pass of a train replica
    look: float  # for a token: the forward pass that recomputes old log-probs
    optimizer: float  # of an optimizer step
    publish: float
    source: str  # where they come from, in words


class Lengths(Protocol):
    """Where the lengths of responses come from."""

    def draw(self, prompts: int, group_size: int, rng: np.random.Generator) -> np.ndarray:
        """Lengths in tokens, int64 [prompts, group_size], each at least 1."""


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Lengths whose logarithm is normal, cut at the longest allowed."""

    mean: float  # tokens, before the cut
    sigma: float  # of the logarithm
    cap: int  # tokens
    within: float = 0.2  # share of the variance of the logarithm that lies within a group

    def draw(self, prompts: int, group_size: int, rng: np.random.Generator) -> np.ndarray:
        """See Lengths."""
        middle = np.log(self.mean) - self.sigma**2 / 2
        between = rng.normal(0, self.sigma * np.sqrt(1 - self.within), (prompts, 1))
        within = rng.normal(0, self.sigma * np.sqrt(self.within), (prompts, group_size))
        drawn = np.exp(middle + between + within)
        return np.clip(drawn, 1, self.cap).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Measured:
    """Lengths as they were seen: whole groups are drawn from these, with replacement."""

    groups: np.ndarray  # int [groups, responses]

    def draw(self, prompts: int, group_size: int, rng: np.random.Generator) -> np.ndarray:
        """See Lengths."""
        rows = rng.integers(len(self.groups), size=(prompts, 1))
        columns = rng.integers(self.groups.shape[1], size=(prompts, group_size))
        return self.groups[rows, columns].astype(np.int64)


@dataclass(frozen=True, slots=True)
class Step:
    """A step as the model sees it."""

    seconds: float
    busy: Mapping[str, float]  # seconds of work by role, the mean of its ranks
    tokens: float  # of prompts and responses, counted for each response
    ranks: int

    def idle(self, role: str) -> float:
        """The share of the step in which the ranks of a role wait for others."""
        return 1 - self.busy[role] / self.seconds

    @property
    def tokens_per_second_per_rank(self) -> float:
        """As throughput/tokens_per_second_per_rank in metrics.jsonl."""
        return self.tokens / self.seconds / self.ranks


def predict(
    placed: Placement, job: Job, rates: Rates, lengths: Lengths, draws: int = DRAWS
) -> Step:
    """The mean step over several batches. The same arguments always give the same."""
    steps = []
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        batch = lengths.draw(job.prompts, job.group_size, rng)
        before = lengths.draw(job.prompts, job.group_size, rng)
        rows, parts = plan(job, placed.rollout.dp, before)
        running = replace(job, max_running=rows)
        steps.append(play(placed, running, rates, _in_order(job, batch, rng), parts))
    busy = {role: float(np.mean([step.busy[role] for step in steps])) for role in steps[0].busy}
    seconds = float(np.mean([step.seconds for step in steps]))
    tokens = float(np.mean([step.tokens for step in steps]))
    return Step(seconds, busy, tokens, placed.world_size)


def plan(job: Job, replicas: int, before: np.ndarray) -> tuple[int, tuple[Part, ...]]:
    """How many rows a rollout replica decodes at a time, and the parts, as a run plans them
    (`Runtime`). `before` [prompts, group_size] are the lengths of the step before."""
    known = ExpectedLengths()
    nothing = np.zeros(0, np.int32)
    prompts = [Prompt(index, "", nothing, "") for index in range(len(before))]
    known.record(prompts, before.tolist())
    rows = max(1, job.cache_tokens // known.typical(job.longest))
    if job.max_running is not None:
        rows = min(rows, job.max_running)
    samples = -(-job.prompts // replicas) * job.group_size
    rounds = -(-samples // rows)
    minibatches = None
    if job.updates == "per_minibatch" and not job.staleness:
        minibatches = job.num_minibatches
    longest = known.longest(job.longest)
    return rows, plan_parts(job.prompts, job.parts, rounds, minibatches, longest)


def play(
    placed: Placement, job: Job, rates: Rates, lengths: np.ndarray, parts: Sequence[Part]
) -> Step:
    """Play one step. `lengths` [prompts, group_size] of the responses, in the batch's order."""
    members = [_members(part, lengths.max(axis=1)) for part in parts]
    handed, decoding = _roll_out(placed.rollout, job, rates, lengths, parts)
    judging = looking = np.zeros((1, len(parts)))
    if "reward" in placed.roles:
        tokens = _tokens(job, lengths, job.reward_microbatch) * rates.reward
        judging = _look(placed.roles["reward"], job, job.reward_microbatch, tokens, members)
    if placed.ref is not None:
        tokens = _tokens(job, lengths, job.ref_microbatch) * rates.ref
        looking = _look(placed.ref, job, job.ref_microbatch, tokens, members)
    learning = _learn(placed.train, job, rates, lengths, members)
    scored = handed.max(axis=0)
    if "reward" in placed.roles:
        scored = _answered(scored, _in_turn(scored, judging).max(axis=0))
    looked = _in_turn(scored, looking).max(axis=0)
    if placed.colocated:  # a rank does all of it, one after the other
        seconds = decoding.max() + judging.sum(axis=1).max() + looking.sum(axis=1).max()
        seconds += learning.sum()
    elif job.staleness:  # what is learnt from has come in the step before
        seconds = max(looked[-1], learning.sum())
    else:
        seconds = _in_turn(looked, learning[None])[0, -1]
    working = {
        "train": learning.sum() + rates.publish,
        "rollout": decoding.mean() + rates.publish,
        "ref": looking.sum(axis=1).mean(),
        "reward": judging.sum(axis=1).mean(),
    }
    busy = {role: float(working[role]) for role in placed.roles}
    count = float(lengths.sum() + job.prompt_tokens * lengths.size)
    return Step(float(seconds + rates.publish), busy, count, placed.world_size)


def _answered(handed: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """When rollout has taken a reward model's values of each part: once the next one is known, since it
    does not stand still for them. Arrays [parts], seconds.

    >>> _answered(np.array([1.0, 5.0, 6.0]), np.array([3.0, 8.0, 9.0]))
    array([5., 8., 9.])
    """
    following = np.append(handed[1:], 0.0)
    return np.maximum.accumulate(np.maximum(judged, following))


def _in_order(job: Job, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The groups of a batch in the order in which they are dealt to minibatches."""
    if job.minibatch_order == "drawn":
        return lengths
    error = rng.normal(0, EXPECTATION_ERROR, len(lengths))
    return lengths[np.argsort(np.log(lengths.max(axis=1)) + error)]


def _members(part: Part, longest: np.ndarray) -> np.ndarray:
    """Positions of the groups that a part turns out to hold."""
    there = longest[part.positions.start : part.positions.stop]
    held = (there >= part.lengths.start) & (there < part.lengths.stop)
    return np.flatnonzero(held) + part.positions.start


def _in_turn(arrivals: np.ndarray, work: np.ndarray) -> np.ndarray:
    """When each worker has done each part: `arrivals` [parts], `work` [workers, parts], seconds.

    A worker takes the parts in turn, each when it has come and the one before is done:

    >>> _in_turn(np.array([1.0, 2.0]), np.array([[3.0, 1.0]]))
    array([[4., 5.]])
    """
    done = np.zeros(work.shape)
    free = np.zeros(len(work))
    for number, arrival in enumerate(arrivals):
        free = np.maximum(free, arrival) + work[:, number]
        done[:, number] = free
    return done


# -- the work of each role -------------------------------------------------------------------------


def _roll_out(
    grid: RankGrid, job: Job, rates: Rates, lengths: np.ndarray, parts: Sequence[Part]
) -> tuple[np.ndarray, np.ndarray]:
    """When each replica hands over each part [replicas, parts], and ends [replicas]; in seconds."""
    handed = np.zeros((grid.dp, len(parts)))
    ends = np.zeros(grid.dp)
    for replica in range(grid.dp):
        positions = np.arange(replica, len(lengths), grid.dp)
        if not len(positions):
            continue
        decoding = Decoding(lengths[positions], job, rates)
        ends[replica] = decoding.known(ANY_LENGTH).max()
        for number, part in enumerate(parts):
            there = (positions >= part.positions.start) & (positions < part.positions.stop)
            if there.any():
                handed[replica, number] = decoding.known(part.lengths.stop)[there].max()
    return np.maximum.accumulate(handed, axis=1), ends


class Decoding:
    """A rollout replica at work: continuous batching of its rows, in the order of its groups."""

    def __init__(self, lengths: np.ndarray, job: Job, rates: Rates) -> None:
        """`lengths` [groups, responses] of this replica."""
        self._lengths = lengths
        rows = lengths.reshape(-1)
        limit = job.max_running or len(rows)
        begun = np.zeros(len(rows), dtype=np.int64)  # decode steps before each row's first
        running: list[int] = []  # the steps after which rows end, a heap
        steps = [0]
        seconds = [0.0]
        row = 0
        while row < len(rows) or running:
            now = seconds[-1]
            while row < len(rows) and len(running) < limit:
                if row % lengths.shape[1] == 0:
                    now += rates.prefill * job.prompt_tokens
                begun[row] = steps[-1]
                heapq.heappush(running, steps[-1] + int(rows[row]))
                row += 1
            end = running[0]
            now += (end - steps[-1]) * (rates.decode_step + rates.decode_row * len(running))
            while running and running[0] == end:
                heapq.heappop(running)
            steps.append(end)
            seconds.append(now)
        self._begun = begun.reshape(lengths.shape)
        self._steps = steps
        self._seconds = seconds

    def known(self, stop: int) -> np.ndarray:
        """When each group has ended or has a response of `stop` tokens; seconds [groups]."""
        ended = self._at(self._begun + self._lengths).max(axis=1)
        reached = self._at(self._begun + np.minimum(stop, self._lengths))
        reached = np.where(self._lengths >= stop, reached, np.inf).min(axis=1)
        return np.minimum(ended, reached)

    def _at(self, step: np.ndarray) -> np.ndarray:
        """Seconds at which so many decode steps are over."""
        return np.interp(step, self._steps, self._seconds)


def _look(
    grid: RankGrid,
    job: Job,
    microbatch: float,
    seconds: np.ndarray,
    members: Sequence[np.ndarray],
) -> np.ndarray:
    """Seconds of each replica of a role that looks at samples, for its share of each part, [replicas,
    parts]; `seconds` [groups] without a pipeline's bubble."""
    work = np.zeros((grid.dp, len(members)))
    for number, positions in enumerate(members):
        for replica in range(grid.dp):
            mine = positions[positions % grid.dp == replica]
            bubble = _bubble(len(mine) * job.group_size, microbatch, grid.pp)
            work[replica, number] = seconds[mine].sum() * bubble
    return work


def _learn(
    grid: RankGrid, job: Job, rates: Rates, lengths: np.ndarray, members: Sequence[np.ndarray]
) -> np.ndarray:
    """Seconds of the train replicas once each part has come, [parts]. Samples are balanced over
    them.

    What further epochs take comes with the last part.
    """
    work = np.zeros(len(members))
    again = 0.0
    known = np.zeros(len(lengths), dtype=bool)
    updates = 0
    for number, positions in enumerate(members):
        known[positions] = True
        deals = [positions]
        if job.updates == "per_minibatch":
            deals = _complete_minibatches(job, known, updates)
        for deal in deals:
            tokens = _tokens(job, lengths[deal], job.microbatch).sum() / grid.dp
            samples = len(deal) * job.group_size / grid.dp
            amount = tokens * _bubble(samples, job.microbatch, grid.pp)
            pace = rates.learn
            if job.looks_back and updates > 0:
                pace += rates.look
            is_update = job.updates == "per_minibatch" or bool(known.all())
            end = rates.optimizer * is_update
            updates += is_update
            work[number] += amount * pace + end
            again += amount * rates.learn + end
    work[-1] += (job.epochs - 1) * again
    return work


def _complete_minibatches(job: Job, known: np.ndarray, updates: int) -> list[np.ndarray]:
    """Positions of the groups of each minibatch that can be learnt from now, `updates` having been.

    Minibatches are learnt from in order, each when all its groups are known.
    """
    found = []
    for minibatch in range(updates, job.num_minibatches):
        first = minibatch * job.prompts // job.num_minibatches
        stop = (minibatch + 1) * job.prompts // job.num_minibatches
        if not known[first:stop].all():
            break
        found.append(np.arange(first, stop))
    return found


def _tokens(job: Job, lengths: np.ndarray, microbatch: float) -> np.ndarray:
    """Tokens that a model reads of each group: its prompt once in each microbatch."""
    microbatches = max(1.0, job.group_size / microbatch)
    return lengths.sum(axis=1) + job.prompt_tokens * microbatches


def _bubble(samples: float, microbatch: float, stages: int) -> float:
    """How much longer a pipeline takes than without its filling and draining (Narayanan et al.
    2021): of m microbatches and p stages, (m + p - 1) / m."""
    count = max(1.0, samples / microbatch)
    return (count + stages - 1) / count
