"""What a world asks of each of its ranks: groups, device memory of HCCL, bytes. Counted, not run.

The lists that a run makes its groups by (distributed/group_list.py) and the plan that it publishes
by (weight_sync/plan.py) are pure, so any number of ranks can be asked for here without one of them.
Of each role the rank with the most is told, of each number.

Bytes of samples follow from what is sent (distributed/wire.py, policy/handover.py), and with them those
of routes, which replay takes past the reference (policy/route_handover.py). A broadcast on
the host is taken to be a binomial tree, in which the root sends ceil(log2 k) times to k ranks.

Where the receivers of a publication have many sources, several of them share a group and hear one
another: bytes in, for a train rank.

Bytes of a checkpoint: the weights, cut by TP, PP and EP, and the optimizer's 12 for each parameter, both
shared out among the ranks that hold the same. Memory of HCCL: two buffers for each group that is connected at start.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from r1zero.distributed.group_list import HOST, count_groups, groups_of
from r1zero.distributed.placement import Placement, RankGrid
from r1zero.models.params import ParamSpec, Shards, Stages, num_elements, stage_of
from r1zero.models.sizes import OPTIMIZER_BYTES
from r1zero.weight_sync.plan import Plan, plan

# Bytes of samples on their way, at most: of a group and of a sample beside its tokens, and of a token
# without and with the log-probs of the reference.
GROUP_BYTES = 40
SAMPLE_BYTES = 48
DRAWN_BYTES = 8
LOOKED_AT_BYTES = 12
# Of the table that all train ranks get: of a group and of a sample.
TABLE_GROUP_BYTES = 9
TABLE_SAMPLE_BYTES = 26


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The tensors of a model, and the bytes of an element."""

    tensors: Sequence[ParamSpec]
    num_layers: int
    element_size: int
    adapters: Sequence[ParamSpec] = ()  # that learn, and are saved, in place of the tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The samples of a step."""

    groups: int
    group_size: int
    tokens: int  # of a response
    prompt_tokens: int = 0
    route_bytes: int = 0  # of the experts that a token went to, if they are replayed

    @property
    def samples(self) -> int:
        return self.groups * self.group_size

    def bytes(self, token_bytes: int) -> int:
        """All samples as they travel."""
        return self.groups * GROUP_BYTES + self.samples * (SAMPLE_BYTES + token_bytes * self.tokens)

    @property
    def response_routes(self) -> int:
        """Bytes of the routes of all responses."""
        return self.samples * self.tokens * self.route_bytes

    @property
    def prompt_routes(self) -> int:
        """The same of all prompts, once."""
        return self.groups * self.prompt_tokens * self.route_bytes

    @property
    def table_bytes(self) -> int:
        """The table of lengths and rewards."""
        return self.groups * TABLE_GROUP_BYTES + self.samples * TABLE_SAMPLE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleScale:
    """What one rank of a role has or does, the most of any; bytes of one step, a publication or a
    checkpoint."""

    ranks: int
    host_groups: int  # gloo
    device_groups: int  # of its roles
    publish_groups: int
    hccl_bytes: int  # device memory from the start on
    published_in: int
    published_out: int
    samples_in: int
    samples_out: int
    checkpoint: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What a world asks for."""

    world_size: int
    roles: Mapping[str, RoleScale]
    groups: int  # of all roles together
    publish_groups: int
    pieces: int  # of the plan of publishing
    plan_seconds: float  # to make it, which each rank does at its start


def count(
    placed: Placement,
    rollout: RankGrid,
    network: Network,
    load: Load,
    bucket_megabytes: int,
    tensor_megabytes: int,
    resets_reference: bool = False,
) -> Scale:
    """Count. `rollout` as the engine cuts weights over it (WeightLayout.grid); `tensor_megabytes` as
    in groups_of; of the steps that reset the reference, if there are any. BadInput when TP does not
    divide a tensor or PP the layers."""
    targets = [rollout]
    if resets_reference and placed.ref is not None:
        targets.append(placed.ref)
    began = time.perf_counter()
    plans = []
    for target in targets:
        plans.append(
            plan(
                network.tensors,
                network.num_layers,
                placed.train,
                target,
                network.element_size,
                bucket_megabytes * 2**20,
            )
        )
    seconds = time.perf_counter() - began
    publishing = _Publishing.of(plans, network.element_size)
    roles = {}
    for role, grid in placed.roles.items():
        roles[role] = _count_role(
            placed, grid, publishing, network, load, bucket_megabytes, tensor_megabytes
        )
    return Scale(
        world_size=placed.world_size,
        roles=roles,
        groups=sum(count_groups(grid) for grid in placed.grids),
        publish_groups=len(publishing.rank_sets),
        pieces=publishing.pieces,
        plan_seconds=seconds,
    )


def scale_table(scale: Scale) -> list[list[str]]:
    """The rows of a table with its heading: a line for each role."""
    heading = "a rank of|ranks|host groups|device groups|publish groups|HCCL GB"
    heading += "|weights GB in|out|samples MB in|out|checkpoint GB"
    rows = [heading.split("|")]
    for role, one in scale.roles.items():
        counts = (one.ranks, one.host_groups, one.device_groups, one.publish_groups)
        gigabytes = (one.hccl_bytes, one.published_in, one.published_out)
        row = [role, *map(str, counts), *(f"{value / 1e9:.2f}" for value in gigabytes)]
        row += [f"{one.samples_in / 1e6:.3g}", f"{one.samples_out / 1e6:.3g}"]
        rows.append([*row, f"{one.checkpoint / 1e9:.2f}"])
    return rows


@dataclass(frozen=True, slots=True)
class _Publishing:
    """Plans of publishing, added up by rank."""

    rank_sets: set[tuple[int, ...]]  # of its process groups
    groups: Counter[int]
    received: Counter[int]  # bytes
    sent: Counter[int]
    pieces: int

    @classmethod
    def of(cls, plans: Sequence[Plan], element_size: int) -> _Publishing:
        rank_sets: set[tuple[int, ...]] = set()
        groups: Counter[int] = Counter()
        received: Counter[int] = Counter()
        sent: Counter[int] = Counter()
        pieces = 0
        for published in plans:
            rank_sets.update(published.groups())
            for route in published.routes:
                amount = route.numel * element_size
                pieces += len(route.cuts)
                for rank in (*route.receivers, *route.listeners):
                    received[rank] += amount
                if not route.local:
                    sent[route.source] += amount
        for ranks in rank_sets:
            groups.update(ranks)
        return cls(rank_sets, groups, received, sent, pieces)


def _count_role(
    placed: Placement,
    grid: RankGrid,
    publishing: _Publishing,
    network: Network,
    load: Load,
    bucket_megabytes: int,
    tensor_megabytes: int,
) -> RoleScale:
    """The most of any rank of a role."""
    host = 0
    device = 0
    megabytes = 0
    for stage in range(grid.pp):  # ranks of one stage are alike
        groups = groups_of(placed, grid.rank_at(pp=stage), tensor_megabytes)
        on_host = sum(group.plane == HOST for group in groups)
        host = max(host, on_host)
        device = max(device, len(groups) - on_host)
        megabytes = max(megabytes, sum(group.device_megabytes for group in groups))
    publish = max(publishing.groups[rank] for rank in grid.ranks)
    megabytes += 2 * bucket_megabytes * publish
    samples_in, samples_out = _samples(placed, grid.role, load)
    return RoleScale(
        ranks=grid.size,
        host_groups=host,
        device_groups=device,
        publish_groups=publish,
        hccl_bytes=megabytes * 2**20,
        published_in=max(publishing.received[rank] for rank in grid.ranks),
        published_out=max(publishing.sent[rank] for rank in grid.ranks),
        samples_in=samples_in,
        samples_out=samples_out,
        checkpoint=_checkpoint(network, grid) if grid.role == "train" else 0,
    )


def _samples(placed: Placement, role: str, load: Load) -> tuple[int, int]:
    """Bytes of samples that the busiest rank of a role takes in and gives away in a step.

    A replica's input rank tells what it gets to the replica's other ranks. Of train it is rank 0,
    which also tells the table to all train ranks.
    """
    grid = placed.roles[role]
    drawn = load.bytes(DRAWN_BYTES)
    has_ref = placed.ref is not None
    looked_at = load.bytes(LOOKED_AT_BYTES) if has_ref else drawn
    told = _hops(grid.size // grid.dp)
    # the routes of a prompt go to each replica of train that learns from one of its samples
    prompt_copies = min(placed.train.dp, load.group_size)
    if role == "reward":
        share = drawn // grid.dp
        return share, told * share
    if role == "rollout":
        # who hands over to train joins the table of all groups and tells it; so does who sends routes
        tables = 0 if has_ref and not load.route_bytes else load.table_bytes
        given = drawn + load.response_routes + prompt_copies * load.prompt_routes
        if "reward" in placed.roles:
            given += drawn
        return tables, given // grid.dp + 2 * tables
    if role == "ref":
        share = drawn // grid.dp
        return share + load.table_bytes, told * share + looked_at // grid.dp + 2 * load.table_bytes
    share = (looked_at + load.response_routes) // grid.dp
    share += load.prompt_routes * prompt_copies // grid.dp
    return load.table_bytes + share, _hops(grid.size) * load.table_bytes + told * share


def _hops(ranks: int) -> int:
    """How often the root of a broadcast to so many ranks, itself among them, sends."""
    return math.ceil(math.log2(ranks))


def _checkpoint(network: Network, train: RankGrid) -> int:
    """Bytes that a train rank of the fullest stage writes."""
    elements = [0.0] * train.pp
    stages = Stages.of(network.num_layers, train)
    shards = Shards.of_grid(train)
    for tensor in network.adapters or network.tensors:
        stage = stage_of(tensor, stages)
        copies = train.expert_data_size if tensor.cut == "experts" else train.cp * train.dp
        elements[stage] += num_elements(tensor, shards) / copies
    return int(max(elements) * (OPTIMIZER_BYTES + network.element_size))
