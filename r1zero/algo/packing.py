"""Samples to microbatches: balanced over replicas, packed end to end without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from r1zero.batch import Prompt, Sample


@dataclass(frozen=True, slots=True)
class Item:
    """A sample ready to be looked at by a model: its prompt, itself, and its number in the batch."""

    number: int
    prompt: Prompt
    sample: Sample

    @property
    def length(self) -> int:
        """Tokens that a model must read: the last response token predicts nothing."""
        return len(self.prompt.tokens) + len(self.sample.tokens) - 1


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Sequences laid end to end. T tokens, R of which predict a response token.

    Two samples, prompts [7 8] and [9], responses [1 2] and [3 4]: tokens [7 8 1 9 3], ends [3, 5],
    rows [1 2 3 4], targets [1 2 3 4], starts [0, 2, 4].
    """

    items: list[Item]
    tokens: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T], within each sequence
    ends: list[int]  # cumulative sequence lengths
    rows: torch.Tensor  # int64 [R], places in `tokens` whose output predicts a response token
    targets: torch.Tensor  # int64 [R]
    starts: list[int]  # [items + 1], where each sample's response begins in `rows`

    def spread(self, per_sample: Sequence[float]) -> torch.Tensor:
        """Repeat one number per sample for each of its response tokens: fp32 [R]."""
        counts = np.diff(self.starts)
        return torch.from_numpy(np.repeat(np.asarray(per_sample, dtype=np.float32), counts)).to(self.targets.device)

    def join(self, per_token: Sequence[np.ndarray]) -> torch.Tensor:
        """Lay one array per sample end to end: fp32 [R]."""
        return torch.from_numpy(np.concatenate(per_token).astype(np.float32)).to(self.targets.device)

    def cut(self, values: torch.Tensor) -> list[np.ndarray]:
        """The inverse of `join`."""
        array = values.detach().float().cpu().numpy()
        return [array[a:b] for a, b in zip(self.starts, self.starts[1:])]


def pack(items: list[Item], device: torch.device, multiple_of: int = 1) -> Microbatch:
    """Lay the items end to end. Tokens that fill up to `multiple_of` form a sequence of their own."""
    tokens, positions, rows, targets, ends, starts = [], [], [], [], [], [0]
    total = 0
    for item in items:
        prompt, response = item.prompt.tokens, item.sample.tokens
        tokens += [prompt, response[:-1]]
        positions.append(np.arange(item.length))
        rows.append(np.arange(total + len(prompt) - 1, total + item.length))
        targets.append(response)
        total += item.length
        ends.append(total)
        starts.append(starts[-1] + len(response))
    if total % multiple_of:
        filler = multiple_of - total % multiple_of
        tokens.append(np.zeros(filler, dtype=np.int64))
        positions.append(np.arange(filler))
        ends.append(total + filler)

    def tensor(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)

    return Microbatch(items, tensor(tokens), tensor(positions), ends, tensor(rows), tensor(targets), starts)


def share_out(items: Sequence[Item], replicas: int) -> list[list[Item]]:
    """Deal the items to replicas so that their token counts are close, keeping order within each.

    Longest first to the least loaded replica (Graham 1969: at most 4/3 of the best possible).
    """
    loads, shares = [0] * replicas, [[] for _ in range(replicas)]
    for item in sorted(items, key=lambda item: (-item.length, item.number)):
        replica = loads.index(min(loads))
        loads[replica] += item.length
        shares[replica].append(item)
    return [sorted(share, key=lambda item: item.number) for share in shares]


def cut_microbatches(items: Sequence[Item], max_samples: int, max_tokens: int | None) -> list[list[Item]]:
    """Cut a replica's share into microbatches: by tokens when a budget is given, else by samples.

    With a token budget, longest first into the first microbatch with room; an item longer than the
    budget gets one of its own.
    """
    if max_tokens is None:
        return [list(items[i:i + max_samples]) for i in range(0, len(items), max_samples)]
    bins: list[list[Item]] = []
    room: list[int] = []
    for item in sorted(items, key=lambda item: (-item.length, item.number)):
        place = next((i for i, free in enumerate(room) if free >= item.length), None)
        if place is None:
            bins.append([])
            room.append(max_tokens)
            place = len(bins) - 1
        bins[place].append(item)
        room[place] -= item.length
    return bins
