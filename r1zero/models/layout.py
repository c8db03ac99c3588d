"""Weight layout: the tensors that published weights are written into, as an engine names them.

Weights travel as boxes of `ParamSpec.view`, in Megatron's fused tensors. Where an engine holds
Hugging Face's tensors, a box is cut into regions that lie in one of them each. The rows of
linear_qkv with two groups of two query heads (each name stands for the rows of one head):

    linear_qkv                q0 q1 k0 v0   q2 q3 k1 v1        q_proj  q0 q1 q2 q3
    a box of it                  |----------------|            k_proj  k0 k1
    its regions                  q1 k0 v0   q2 q3              v_proj  v0 v1

so that box is written to rows 1 of q_proj, 0 of k_proj, 0 of v_proj, and 2 to 3 of q_proj.

Hugging Face has a tensor for each expert. Those of a rank that holds the experts 4 to 7 are tensors
of the experts 4 to 7 there: which of them a box is written to depends on the rank.

Needs no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from r1zero.distributed.placement import RankGrid
from r1zero.errors import BadInput
from r1zero.models.params import (
    FIRST,
    WHOLE,
    ParamSpec,
    ShardIndex,
    Shards,
    local_view,
    num_elements,
)

if TYPE_CHECKING:
    import torch

Box = tuple[slice, ...]  # a region of a tensor, one slice an axis
Index = tuple[slice | int, ...]


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """Which tensors each rank of an engine holds. Known to all ranks of the world, by the engine's
    class."""

    names: Literal["megatron", "hf"]  # ParamSpec.name, or ParamSpec.hf
    cut: bool  # True: a rank holds its TP part of every tensor; False: all of it

    def __post_init__(self) -> None:
        if self.names not in ("megatron", "hf"):
            raise BadInput(f"a weight layout names tensors as megatron or hf, not {self.names}")

    def grid(self, rollout: RankGrid) -> RankGrid:
        """The rollout ranks as this layout cuts tensors over them: uncut, each is a replica."""
        if self.cut:
            return rollout
        return RankGrid.of(rollout.role, rollout.first, rollout.size)


@dataclass(frozen=True, slots=True)
class WeightTarget:
    """Where a rank's engine takes its weights: the tensors to write into, in place.

    `commit(version)` says that all of them were written, and with which version of the weights.
    """

    layout: WeightLayout
    tensors: Mapping[str, torch.Tensor]  # by the layout's names; all of one dtype
    commit: Callable[[int], None]

    def problems(
        self, specs: Sequence[ParamSpec], shards: Shards, index: ShardIndex = FIRST
    ) -> list[str]:
        """Say of each parameter that has no place here what is wrong; see `regions`."""
        found = []
        for spec in specs:
            names: Sequence[str] = (spec.name,)
            if self.layout.names == "hf":
                names = hf_names(spec, shards, index)
            missing = [name for name in names if name not in self.tensors]
            held = sum(self.tensors[name].numel() for name in names if name in self.tensors)
            wanted = num_elements(spec, shards)
            if missing:
                found.append(f"{missing[0]} is missing")
            elif held != wanted:
                found.append(f"{' and '.join(names)}: {held} elements instead of {wanted}")
        return found

    def regions(
        self, spec: ParamSpec, box: Box, shards: Shards, index: ShardIndex = FIRST
    ) -> Iterator[tuple[Index, torch.Tensor]]:
        """Where a box of a rank's part of `spec.view` lies; parts and part are those of the layout's
        grid.

        Yields (index into the box's values, the view that takes them).
        """
        if self.layout.names == "megatron":
            yield _everything(box), local_view(spec, self.tensors[spec.name], shards)[box]
            return
        for place, name, region in hf_regions(spec, box, shards, index):
            yield place, self.tensors[name].detach()[region]

    def write(
        self, spec: ParamSpec, param: torch.Tensor, shards: Shards, index: ShardIndex = FIRST
    ) -> None:
        """Write a rank's parameter in Megatron's layout; see `regions`."""
        values = local_view(spec, param, shards)
        whole = tuple(slice(0, size) for size in values.shape)
        for place, view in self.regions(spec, whole, shards, index):
            view.copy_(values[place])


def hf_names(spec: ParamSpec, shards: Shards, index: ShardIndex) -> tuple[str, ...]:
    """The Hugging Face tensors of which a rank holds something: of experts those that it has."""
    if spec.cut != "experts":
        return spec.hf
    count = len(spec.hf) // shards.ep
    return spec.hf[index.ep * count : (index.ep + 1) * count]


def hf_regions(
    spec: ParamSpec, box: Box, shards: Shards = WHOLE, index: ShardIndex = FIRST
) -> Iterator[tuple[Index, str, Box]]:
    """Cut a box of a rank's part of `spec.view` where it passes from one Hugging Face tensor to the
    next.

    Yields (index into the box's values, name, region of the rank's part of that tensor). The box of
    the drawing at the top, rows 1 to 5 of 8, in one column:

    >>> qkv = ParamSpec(
    ...     name="qkv",
    ...     hf=("q", "k", "v"),
    ...     hf_shape=((4, 1), (2, 1), (2, 1)),
    ...     view=(8, 1),
    ...     axis=0,
    ...     layer=0,
    ...     place="layer",
    ...     kv_groups=2,
    ... )
    >>> for place, name, region in hf_regions(qkv, (slice(1, 6), slice(0, 1))):
    ...     print(place[0].start, place[0].stop, "->", name, region[0].start, region[0].stop)
    0 1 -> q 1 2
    1 2 -> k 0 1
    2 3 -> v 0 1
    3 5 -> q 2 4
    """
    if spec.kv_groups is not None:
        parts = shards.of(spec)
        assert spec.kv_groups % parts == 0, f"{spec.name}: TP {parts} cuts a group of heads"
        yield from _qkv_regions(spec, spec.kv_groups, box)
    else:
        yield from _stacked_regions(spec, box, hf_names(spec, shards, index))


def _stacked_regions(
    spec: ParamSpec, box: Box, names: Sequence[str]
) -> Iterator[tuple[Index, str, Box]]:
    """The same for tensors that lie one behind the other along the view's first axes.

    Gate and up of three experts, (3, 2, F, H), are the names 0 to 5; the last one's up, at the place
    (2, 1), is name 2 * 2 + 1. One that is no other's neighbour, (F, H), has the place ().
    """
    axes = len(box) - len(spec.hf_shape[0])
    for place in itertools.product(*(range(side.start, side.stop) for side in box[:axes])):
        number = 0
        for position, size in zip(place, spec.view, strict=False):
            number = number * size + position
        inside = tuple(position - side.start for position, side in zip(place, box, strict=False))
        yield inside, names[number], box[axes:]


def _everything(box: Box) -> Index:
    return (slice(None),) * len(box)


def _qkv_regions(spec: ParamSpec, groups: int, box: Box) -> Iterator[tuple[Index, str, Box]]:
    """The same for a fused projection; see the drawing at the top."""
    rows = spec.view[0] // groups  # of one group: its queries, its key, its value
    first = box[0].start
    last = box[0].stop
    row = first
    while row < last:
        group = row // rows
        name, share, begin = _source_of(spec, groups, row - group * rows)
        begin += group * rows
        stop = min(last, begin + share)
        start = group * share + row - begin
        region = (slice(start, start + stop - row), *box[1:])
        yield (slice(row - first, stop - first),), name, region
        row = stop


def _source_of(spec: ParamSpec, groups: int, row: int) -> tuple[str, int, int]:
    """Which source has this row of a group, how many rows it has there, and the first of them."""
    begin = 0
    for name, size in zip(spec.hf, spec.hf_shape, strict=True):
        share = size[0] // groups
        if row < begin + share:
            return name, share, begin
        begin += share
    raise AssertionError(f"a group of {spec.name} has {begin} rows, so there is no row {row}")
