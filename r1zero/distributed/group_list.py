"""Which process groups a rank is in: for each role those that its code uses. Pure; no torch.

A role's code talks inside lines of its grid, named after the axes along which their ranks differ:

    name             ranks                             what travels
    role_control     the whole role                    decisions, samples, checkpoints; on the host
    replica_control  one replica                       samples; on the host
    tp               one tensor-parallel group         activations; in rollout while tokens are decoded
    cp               one context-parallel group        keys and values
    dp               the same shard everywhere         gradients and parameters; its ranks differ in cp, too
    pp               one pipeline                      activations
    mp               its ranks with one cp index       nothing; Megatron asks who is in it
    ep               the experts of a layer            tokens on their way to experts and back
    expt_dp          the same experts everywhere       their gradients and parameters
    ep_dp            in ep, those of one TP index      in rollout tokens on their way to experts and back
    ep_dp_control    the same                          how many tokens; on the host
    tp_ep_pp         all experts, of all layers        nothing, as mp
    tp_dp            a stage                           nothing, as mp
    all              the whole role                    norms of gradients
    embd             first and last stage of a line    gradients of tied embeddings
    self             this rank                         nothing; for axes that a role does not have

With TP 2, DP 2, PP 2 from rank 0, rank 5 is in tp 4 5, dp 5 7, pp 1 5, mp 0 1 4 5, embd 1 5; with EP 4
in ep 4 5 6 7, expt_dp 5, tp_ep_pp 0 to 7, tp_dp 4 5 6 7.

On NPUs every group in use takes two buffers of device memory, so that a role has no more of them
than it uses. A group is connected at start (`warm`) where its first use would be in the middle of a
step; others connect, and take their memory, at their first use, to which all members come at once
and which most jobs never see. A group of one rank has nobody to connect to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from r1zero.distributed.placement import DATA_AXIS, Placement, RankGrid

SMALL_BUFFER = 16  # MB of device memory for a group in which scalars travel
# Where a group's tensors are: on the host, on devices, or now here, now there.
HOST = "host"
DEVICE = "device"
BOTH = "both"


@dataclass(frozen=True, slots=True)
class Use:
    """What a role does with its groups of one name."""

    plane: str  # HOST, DEVICE or BOTH
    large: bool = False  # tensors travel, not scalars
    warm: bool = False
    decodes: bool = False  # it sums while tokens are decoded


@dataclass(frozen=True, slots=True)
class PlannedGroup:
    """One group, as one of its ranks sees it."""

    names: tuple[str, ...]  # "train tp"; several where one group serves for all of them
    ranks: tuple[int, ...]  # in ascending order
    plane: str
    megabytes: int  # of one buffer on the device; 0 on the host
    warm: bool
    decodes: bool

    @property
    def device_megabytes(self) -> int:
        """Device memory that HCCL takes for it at start: two buffers."""
        return 2 * self.megabytes if self.warm else 0


CONTROL = Use(HOST)
OF_REPLICAS = ("ep_dp", "ep_dp_control")  # that share experts
OF_EXPERTS = ("ep", "expt_dp", "tp_ep_pp", "tp_dp", *OF_REPLICAS)
EVERYTHING = {
    # Saving a checkpoint, Megatron sends a flag from device to device over its default group, which
    # this one stands for.
    "role_control": Use(BOTH),
    "replica_control": CONTROL,
    "tp": Use(DEVICE, large=True, warm=True),
    "dp": Use(DEVICE, large=True, warm=True),
    "pp": Use(DEVICE, large=True, warm=True),
    "mp": Use(DEVICE),
    "cp": Use(DEVICE, large=True, warm=True),
    "ep": Use(DEVICE, large=True, warm=True),
    "expt_dp": Use(DEVICE, large=True, warm=True),
    "tp_ep_pp": Use(DEVICE),
    "tp_dp": Use(DEVICE),
    "all": Use(DEVICE, warm=True),
    "embd": Use(DEVICE, large=True),
    "self": Use(DEVICE),
}
# Of a role whose model looks at samples and does not learn.
LOOKING: Mapping[str, Use] = {
    "role_control": CONTROL,
    "replica_control": CONTROL,
    "tp": Use(DEVICE, large=True, warm=True),
    "pp": Use(DEVICE, large=True, warm=True),
    "cp": Use(DEVICE, large=True, warm=True),
    "ep": Use(DEVICE, large=True, warm=True),
    "expt_dp": Use(DEVICE),
    "tp_ep_pp": Use(DEVICE),
    "tp_dp": Use(DEVICE),
    "embd": Use(DEVICE),
    "self": Use(DEVICE),
}
# By role; one that is not named has everything.
USES: Mapping[str, Mapping[str, Use]] = {
    "train": EVERYTHING,
    "rollout": {
        "role_control": CONTROL,
        "replica_control": CONTROL,
        "tp": Use(DEVICE, large=True, warm=True, decodes=True),
        # HCCL lets one group of a rank decode by AIV: tp, which has the small sums.
        "ep_dp": Use(DEVICE, large=True, warm=True),
        "ep_dp_control": CONTROL,
    },
    "ref": LOOKING,
    "reward": LOOKING,
}


def groups_of(placement: Placement, rank: int, tensor_megabytes: int) -> list[PlannedGroup]:
    """The groups of a rank, in the order in which it makes them; those of publishing come later.

    `tensor_megabytes` is the buffer of a group in which tensors travel. Every member of a group
    lists it with the same values. The order is by role, then by name, and a rank has one group of a
    name, so that no ranks wait for one another in a circle.
    """
    found: dict[tuple[str, tuple[int, ...]], PlannedGroup] = {}
    for span in placement.grids:
        if rank not in span.ranks:
            continue
        for group in _of_role(span, rank, tensor_megabytes):
            key = (group.plane, group.ranks)
            found[key] = _joined(found[key], group) if key in found else group
    return list(found.values())


def count_groups(span: RankGrid) -> int:
    """How many groups all ranks of a role make together."""
    kinds: dict[tuple[str, tuple[int, ...]], str] = {}
    for group in _of_role(span, span.first, 0):
        _, _, name = group.names[0].partition(" ")
        kinds.setdefault((group.plane, group.ranks), name)
    return sum(_lines(span, name) for name in kinds.values())


def _of_role(span: RankGrid, rank: int, tensor_megabytes: int) -> list[PlannedGroup]:
    """The groups of a rank in one role, one for each name that the role uses."""
    found = []
    for name, use in USES.get(span.role, EVERYTHING).items():
        if name in OF_REPLICAS and not span.experts_span_replicas:
            continue
        ranks = _line(span, rank, name)
        if rank not in ranks:
            continue
        alone = len(ranks) == 1
        if name in OF_EXPERTS and span.ep == 1:
            use = replace(use, large=False, warm=False)  # a model without experts uses none of them
        megabytes = 0
        if use.plane != HOST:
            megabytes = tensor_megabytes if use.large and not alone else SMALL_BUFFER
        found.append(
            PlannedGroup(
                names=(f"{span.role} {name}",),
                ranks=ranks,
                plane=use.plane,
                megabytes=megabytes,
                warm=use.warm and not alone,
                decodes=use.decodes and not alone,
            )
        )
    return found


def _joined(first: PlannedGroup, second: PlannedGroup) -> PlannedGroup:
    """One group for two uses of the same ranks. HCCL lets a group decode only if it does nothing
    else."""
    return replace(
        first,
        names=first.names + second.names,
        megabytes=max(first.megabytes, second.megabytes),
        warm=first.warm or second.warm,
        decodes=first.decodes and second.decodes,
    )


def _axes(span: RankGrid, name: str) -> list[str]:
    """The axes along which the ranks of a group differ."""
    if name in ("role_control", "all"):
        return list(span.axes)
    if name == "replica_control":
        return [axis for axis in span.axes if axis != DATA_AXIS]
    if name == "mp":
        return [axis for axis in span.axes if axis not in (DATA_AXIS, "cp")]
    if name == "dp":
        return [axis for axis in span.axes if axis in (DATA_AXIS, "cp")]
    if name == "embd":
        return ["pp"]
    return [axis for axis in span.axes if axis == name]


def _line(span: RankGrid, rank: int, name: str) -> tuple[int, ...]:
    """The ranks of the group of this name on the line of `rank`, which need not be among them."""
    if name in OF_EXPERTS:
        return _expert_line(span, rank, name)
    axes = _axes(span, name)
    index = span.index_of(rank)
    choices: Iterable[range] = [range(span.axes.get(axis, 1)) for axis in axes]
    ranks = []
    for place in itertools.product(*choices):
        moved = dict(zip(axes, place, strict=True))
        ranks.append(span.rank_at(**{**index, **moved}))
    ranks.sort()
    if name == "embd":
        ranks = sorted({ranks[0], ranks[-1]})
    return tuple(ranks)


def _expert_line(span: RankGrid, rank: int, name: str) -> tuple[int, ...]:
    """The same for groups that expert parallelism makes: EP ranks of a stage that follow each other
    hold all experts of a layer.

    The ranks 0 to 7 of one stage with EP 4: ep 0 1 2 3 and 4 5 6 7, expt_dp 0 4, 1 5, 2 6 and 3 7; with
    TP 2 ep_dp 0 2, 1 3, 4 6 and 5 7.
    """
    stage_index = span.index_of(rank).get("pp", 0)
    stage = span.stage_ranks(stage_index)
    place = span.place_in_stage(rank)
    if name == "tp_dp":
        return tuple(stage)
    if name == "expt_dp":
        return tuple(stage[place % span.ep :: span.ep])
    first = place - place % span.ep
    together = stage[first : first + span.ep]
    if name == "ep":
        return tuple(together)
    if name in OF_REPLICAS:
        return tuple(together[place % span.tp :: span.tp])
    ranks: list[int] = []
    for number in range(span.pp):
        ranks += span.stage_ranks(number)[first : first + span.ep]
    return tuple(ranks)


def _lines(span: RankGrid, name: str) -> int:
    """How many lines of this name a role has."""
    if name in OF_EXPERTS:
        return span.size // len(_expert_line(span, span.first, name))
    along = math.prod(span.axes.get(axis, 1) for axis in _axes(span, name))
    return span.size // along
