"""Sequence packing into microbatches: balanced over replicas, no padding, each prompt once.

The samples of a group share their prompt, so a microbatch computes it once and lets every response
attend to it: with short answers to long prompts that is most of the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import ClassVar, Protocol, TypeVar

import numpy as np
import torch

from r1zero.ops.attention import Segments
from r1zero.types import Prompt, Sample


class Sized(Protocol):
    """What packing needs to know of a sample."""

    @property
    def number(self) -> int:
        """Of the sample in the batch."""

    @property
    def position(self) -> int:
        """Of its prompt in the batch."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompt."""

    @property
    def own_tokens(self) -> int:
        """Tokens beside the prompt that a model must read: of one that trains the last response
        token predicts nothing."""


S = TypeVar("S", bound=Sized)


@dataclass(frozen=True, slots=True)
class TrainSample:
    """A sample ready to be looked at by a model: its number in the batch, its prompt's position,
    and both."""

    number: int
    position: int
    prompt: Prompt
    sample: Sample
    prompt_routes: np.ndarray | None = None  # of the prompt's tokens: see Sample.routes
    # Whether each token of the response is to be predicted, from the one before.
    is_predicted: ClassVar[bool] = True

    @property
    def routes(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Which experts the tokens of its prompt, and its own, went to; None if that is not known."""
        if self.prompt_routes is None or self.sample.routes is None:
            return None
        return self.prompt_routes, self.sample.routes

    def without_routes(self) -> TrainSample:
        """The same for a model whose routers choose themselves."""
        return replace(self, prompt_routes=None)

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt.tokens)

    @property
    def own_tokens(self) -> int:
        return len(self.sample.tokens) - 1


@dataclass(frozen=True, slots=True)
class WholeSample(TrainSample):
    """One that a model reads to its end: not predicted, but valued by the outputs at its tokens."""

    is_predicted: ClassVar[bool] = False

    @property
    def own_tokens(self) -> int:
        return len(self.sample.tokens)


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Prompts and responses laid end to end: T tokens, and R response tokens to be predicted.

    One prompt [7 8] with the responses [1 2 3] and [4 5], whose last tokens predict nothing:

        place        0  1    |  2  3  |  4
        token        7  8    |  1  2  |  4
        position     0  1    |  2  3  |  2
        predicts        1 4  |  2  3  |  5

    >>> prompt = Prompt(0, "", np.array([7, 8]), "")
    >>> responses = [np.array([1, 2, 3]), np.array([4, 5])]
    >>> samples = [Sample(tokens, np.zeros(len(tokens)), False, 0) for tokens in responses]
    >>> items = [TrainSample(number, 0, prompt, sample) for number, sample in enumerate(samples)]
    >>> batch = pack(items, torch.device("cpu"))
    >>> batch.tokens.tolist(), batch.positions.tolist()
    ([7, 8, 1, 2, 4], [0, 1, 2, 3, 2])
    >>> batch.logit_positions.tolist(), batch.targets.tolist(), batch.response_cu_seqlens
    ([1, 2, 3, 1, 4], [1, 2, 3, 4, 5], [0, 3, 5])
    """

    items: Sequence[TrainSample]
    tokens: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    segments: Segments  # a prompt sees itself, a response its prompt and itself
    # int64 [R], places in `tokens` whose output predicts a response token; of whole samples those of
    # the response tokens themselves
    logit_positions: torch.Tensor
    targets: torch.Tensor  # int64 [R]
    # [items + 1], where each sample's response begins in `targets`
    response_cu_seqlens: list[int]
    # Under context parallelism (algo/zigzag.py) `tokens` are those of one rank, and of R it predicts
    # these, int64, to which `logit_positions` belong. None: all of them.
    own_rows: torch.Tensor | None = None
    # uint8 [T, layers with experts, experts per token], experts that tokens go to (routing replay).
    # None: routers choose themselves.
    routes: torch.Tensor | None = None

    @property
    def own_targets(self) -> torch.Tensor:
        """What the outputs at `logit_positions` predict: int64 of the same length."""
        if self.own_rows is None:
            return self.targets
        return self.targets[self.own_rows]

    def per_token(self, per_sample: Sequence[float]) -> torch.Tensor:
        """Repeat one number per sample for each of its response tokens: fp32 [R]."""
        values = np.repeat(
            np.asarray(per_sample, dtype=np.float32), np.diff(self.response_cu_seqlens)
        )
        return torch.from_numpy(values).to(self.targets.device)

    def concat(self, per_token: Sequence[np.ndarray]) -> torch.Tensor:
        """Lay one array per sample end to end: fp32 [R]."""
        return torch.from_numpy(np.concatenate(per_token).astype(np.float32)).to(
            self.targets.device
        )

    def predictions(self) -> torch.Tensor:
        """How many response tokens that the loss counts are predicted from each token: int64 [T],
        [0 2 1 1 1] in the example."""
        counted = self.concat([item.sample.mask for item in self.items]).long()
        if self.own_rows is not None:
            counted = counted[self.own_rows]
        found = torch.zeros_like(self.tokens)
        return found.index_add_(0, self.logit_positions, counted)

    def split(self, values: torch.Tensor) -> list[np.ndarray]:
        """Cut [R] into one fp32 array per sample: the inverse of `concat`."""
        array = values.detach().float().cpu().numpy()
        return [array[a:b] for a, b in pairwise(self.response_cu_seqlens)]


def pack(items: Sequence[TrainSample], device: torch.device, multiple_of: int = 1) -> Microbatch:
    """Lay the items end to end, a prompt once for neighbours that share it.

    Tokens that fill up to `multiple_of` form a segment of their own. Without items there is nothing
    else: a microbatch that runs and predicts nothing. Routes are those of all items, or none.
    """
    lay = _MicrobatchBuilder()
    starts = [0]
    for prompt_group in prompt_groups(items):
        prompt = prompt_group[0].prompt.tokens
        first = lay.add(prompt, 0, np.empty(0, dtype=np.int64))
        prompt_rows = np.arange(first, first + len(prompt))
        for item in prompt_group:
            begin = lay.add(item.sample.tokens[: item.own_tokens], len(prompt), prompt_rows)
            if item.is_predicted:
                lay.logit_positions.append(prompt_rows[-1:])
            lay.logit_positions.append(np.arange(begin, begin + item.own_tokens))
            lay.targets.append(item.sample.tokens)
            starts.append(starts[-1] + len(item.sample.tokens))
    length = max(1, -(-lay.total // multiple_of)) * multiple_of
    filled = length - lay.total
    routes = _routes(items, filled)
    lay.add(np.zeros(filled, dtype=np.int64), 0, np.empty(0, dtype=np.int64))

    def tensor(parts: list[np.ndarray]) -> torch.Tensor:
        whole = np.concatenate([np.empty(0, dtype=np.int64), *parts])
        return torch.from_numpy(whole.astype(np.int64)).to(device)

    segments = Segments(lay.cu_seqlens_q, lay.cu_seqlens_k, tensor(lay.key_rows))
    return Microbatch(
        items,
        tensor(lay.tokens),
        tensor(lay.positions),
        segments,
        tensor(lay.logit_positions),
        tensor(lay.targets),
        starts,
        routes=None if routes is None else torch.from_numpy(routes).to(device),
    )


def _routes(items: Sequence[TrainSample], filled: int) -> np.ndarray | None:
    """Which experts the tokens of a microbatch go to, uint8 [T, layers, k]; None unless there are
    items and all of them know.

    The `filled` tokens that fill it up go where the first ones go, and so to experts that the router
    would choose, too: all to the same, one expert would be busy while others wait.
    """
    parts: list[np.ndarray] = []
    for prompt_group in prompt_groups(items):
        for number, item in enumerate(prompt_group):
            if item.routes is None:
                return None
            of_prompt, own = item.routes
            if number == 0:
                parts.append(of_prompt)
            parts.append(own)
    if not parts:
        return None
    routes = np.concatenate(parts)
    first = np.arange(filled) % len(routes)
    return np.concatenate([routes, routes[first]])


class _MicrobatchBuilder:
    """The parts of a microbatch while it grows."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.logit_positions: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.key_rows: list[np.ndarray] = []
        self.cu_seqlens_q: list[int] = []
        self.cu_seqlens_k: list[int] = []
        self.total = 0

    def add(self, tokens: np.ndarray, position: int, prefix_rows: np.ndarray) -> int:
        """Add a segment that starts at `position` of its sequence; return the place of its first
        token."""
        first = self.total
        count = len(tokens)
        if count:
            self.tokens.append(tokens)
            self.positions.append(np.arange(position, position + count))
            self.key_rows += [prefix_rows, np.arange(first, first + count)]
            self.total += count
            self.cu_seqlens_q.append(self.total)
            self.cu_seqlens_k.append(
                (self.cu_seqlens_k[-1] if self.cu_seqlens_k else 0) + len(prefix_rows) + count
            )
        return first


def prompt_groups(items: Iterable[S]) -> list[list[S]]:
    """Put neighbours that share a prompt together."""
    return [list(group) for _, group in groupby(items, key=lambda item: item.position)]


def num_tokens(prompt_group: Sequence[Sized]) -> int:
    """Tokens that a prompt group takes in a microbatch: its prompt once, and every response."""
    return prompt_group[0].prompt_tokens + sum(item.own_tokens for item in prompt_group)


def balance_over_replicas(items: Sequence[S], loads: list[int]) -> list[list[S]]:
    """Deal the items to replicas so that their token counts are close; prompt groups stay whole if
    there are enough.

    `loads` has the tokens that each replica has already, and is brought up to date. Longest first to
    the least loaded replica (Graham 1969: at most 4/3 of the best possible). Groups of 9, 7, 5 and 4
    tokens on two replicas without any: 9 to the first, 7 and 5 to the second (7 < 9), 4 to the first
    again (9 < 12), so 13 and 12.
    """
    replicas = len(loads)
    shares: list[list[S]] = [[] for _ in range(replicas)]
    whole = prompt_groups(items)
    while len(whole) < min(replicas, len(items)):
        largest = max((group for group in whole if len(group) > 1), key=num_tokens)
        at = whole.index(largest)
        half = len(largest) // 2
        whole[at : at + 1] = [largest[:half], largest[half:]]
    for group in sorted(whole, key=lambda group: (-num_tokens(group), group[0].number)):
        replica = loads.index(min(loads))
        loads[replica] += num_tokens(group)
        shares[replica] += group
    return [sorted(share, key=lambda item: item.number) for share in shares]


def cut_microbatches(items: Sequence[S], max_samples: int, max_tokens: int | None) -> list[list[S]]:
    """Cut a replica's share into microbatches: by tokens when a budget is given, else by samples.

    With a budget, pieces of prompt groups go longest first into the first microbatch with room; an
    item longer than the budget gets a microbatch of its own. Pieces of 6, 5, 4 and 3 tokens with a
    budget of 10: [6 4] [5 3].
    """
    if max_tokens is None:
        return [list(items[i : i + max_samples]) for i in range(0, len(items), max_samples)]
    pieces = [
        piece
        for prompt_group in prompt_groups(items)
        for piece in _pieces(prompt_group, max_tokens)
    ]
    filled: list[list[S]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=lambda piece: (-num_tokens(piece), piece[0].number)):
        place = next((i for i, free in enumerate(room) if free >= num_tokens(piece)), None)
        if place is None:
            filled.append([])
            room.append(max_tokens)
            place = len(filled) - 1
        filled[place] += piece
        room[place] -= num_tokens(piece)
    return filled


def _pieces(prompt_group: list[S], max_tokens: int) -> list[list[S]]:
    """Cut a prompt group where the next response would pass the budget."""
    pieces: list[list[S]] = [[]]
    for item in prompt_group:
        if pieces[-1] and num_tokens([*pieces[-1], item]) > max_tokens:
            pieces.append([])
        pieces[-1].append(item)
    return pieces
