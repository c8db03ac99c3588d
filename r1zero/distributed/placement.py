"""Which rank does what: the device mesh of each role. Pure arithmetic; no torch, no environment.

A role is a set of consecutive ranks laid out as a grid with named axes. The first axis runs fastest
(Megatron's order tp-cp-dp-pp). With tp 2, dp 3, pp 2 the twelve ranks of a role lie so:

    stage 0:  replica 0: 0 1   replica 1: 2 3   replica 2:  4  5
    stage 1:  replica 0: 6 7   replica 1: 8 9   replica 2: 10 11

so rank 9 has tp 1, dp 1, pp 1, its tensor-parallel group is 8 9, its pipeline 3 9, and its replica
2 3 8 9. Roles follow each other in the order train, rollout, ref, reward; when colocated, every role spans
the whole world. A run without a reference has no role ref, one without a reward model no role reward.

Context parallelism cuts the tokens of a replica's microbatches over an axis of their own, cp, between
tp and dp. Expert parallelism has no axis: it deals the experts of a layer to the ranks of a stage,
across replicas. There rank number i = tp + TP * (cp + CP * dp) has the experts of index i mod EP. With
tp 2, dp 4 and EP 4, one stage:

    rank            0  1  2  3  4  5  6  7
    replica         0  0  1  1  2  2  3  3
    expert index    0  1  2  3  0  1  2  3

In rollout, where each TP rank holds whole experts, EP is a multiple of TP: the experts lie on the ranks of
one replica, or of several that follow each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from r1zero.errors import BadInput

DATA_AXIS = "dp"  # along which a role has replicas of its model; all other axes cut one replica


@dataclass(frozen=True, slots=True)
class RankGrid:
    """The ranks of one role and their axes, fastest first: the sizes of `tp`, `cp`, `dp`, `pp`.

    An axis that is not named has size 1.
    """

    role: str
    first: int
    axes: Mapping[str, int]
    ep: int = 1  # ranks of a stage that share the experts of a layer
    # Layers of each pipeline stage; empty: spread evenly.
    num_layer_list: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        role: str,
        first: int,
        size: int,
        tp: int = 1,
        pp: int = 1,
        cp: int = 1,
        ep: int = 1,
        num_layer_list: tuple[int, ...] = (),
    ) -> RankGrid:
        """The grid of `size` ranks, which is a multiple of tp * cp * pp."""
        model = tp * cp * pp
        assert size > 0 and size % model == 0, (
            f"{role}: {size} ranks for TP {tp} x CP {cp} x PP {pp}"
        )
        assert (size // pp) % ep == 0, f"{role}: EP {ep} in stages of {size // pp} ranks"
        axes = {"tp": tp, "cp": cp, DATA_AXIS: size // model, "pp": pp}
        return cls(role, first, MappingProxyType(axes), ep, num_layer_list)

    @property
    def size(self) -> int:
        return math.prod(self.axes.values())

    @property
    def tp(self) -> int:
        return self.axes.get("tp", 1)

    @property
    def cp(self) -> int:
        return self.axes.get("cp", 1)

    @property
    def pp(self) -> int:
        return self.axes.get("pp", 1)

    @property
    def dp(self) -> int:
        """Number of replicas of the model."""
        return self.axes.get(DATA_AXIS, 1)

    @property
    def expert_data_size(self) -> int:
        """Number of ranks of a stage that hold the same experts."""
        return self.tp * self.cp * self.dp // self.ep

    @property
    def experts_span_replicas(self) -> bool:
        """Whether a replica needs experts of ranks outside of it."""
        return self.tp * self.cp % self.ep != 0

    @property
    def ranks(self) -> list[int]:
        return list(range(self.first, self.first + self.size))

    def rank_at(self, **index: int) -> int:
        """The rank at these indices along the axes, such as tp=1, dp=0; 0 along those not named."""
        assert index.keys() <= self.axes.keys(), f"{self.role} has the axes {list(self.axes)}"
        rank = self.first
        stride = 1
        for axis, size in self.axes.items():
            rank += stride * index.get(axis, 0)
            stride *= size
        return rank

    def index_of(self, rank: int) -> dict[str, int]:
        """The index along each axis of a rank of this role."""
        left = rank - self.first
        assert 0 <= left < self.size, f"rank {rank} is not a {self.role} rank"
        found = {}
        for axis, size in self.axes.items():
            found[axis] = left % size
            left //= size
        return found

    def place_in_stage(self, rank: int) -> int:
        """Which of the ranks of its pipeline stage a rank is, tp running fastest, then cp, then dp.

        In the example above rank 9 is number 3 of stage 1.
        """
        index = self.index_of(rank)
        in_replica = index.get("tp", 0) + self.tp * index.get("cp", 0)
        return in_replica + self.tp * self.cp * index.get(DATA_AXIS, 0)

    def expert_index(self, rank: int) -> int:
        """Which of the EP parts of a layer's experts a rank of this role holds."""
        return self.place_in_stage(rank) % self.ep

    def stage_ranks(self, stage: int) -> list[int]:
        """All ranks of a pipeline stage, ascending."""
        return self.rank_groups(*(axis for axis in self.axes if axis != "pp"))[stage]

    def rank_groups(self, *axes: str) -> list[list[int]]:
        """All groups of ranks that differ along these axes only, in order of their first rank.

        In the example above rank_groups("tp") is [0 1] [2 3] ... and rank_groups("dp") is
        [0 2 4] [1 3 5] [6 8 10] [7 9 11].
        """
        fixed = [axis for axis in self.axes if axis not in axes]
        varying = [axis for axis in self.axes if axis in axes]
        result: list[list[int]] = []
        for outer in self._indices(fixed):
            result.append([self.rank_at(**outer, **inner) for inner in self._indices(varying)])
        return result

    def replica(self, number: int) -> list[int]:
        """Ranks that hold one copy of the model; the first is its leader, which receives for it."""
        return self.replicas()[number]

    def replicas(self) -> list[list[int]]:
        """The ranks of every replica."""
        return self.rank_groups(*(axis for axis in self.axes if axis != DATA_AXIS))

    def input_rank(self, replica: int) -> int:
        """The rank that receives for a replica: index 0 along every other axis."""
        return self.rank_at(dp=replica)

    def output_rank(self, replica: int) -> int:
        """The rank of a replica where results appear: TP index 0 of the last stage."""
        return self.rank_at(dp=replica, pp=self.pp - 1)

    def replica_of(self, position: int) -> int:
        """The replica on which a position of a batch lives; positions are dealt in turn.

        With dp 3 the positions 0 1 2 3 4 5 6 live on the replicas 0 1 2 0 1 2 0.
        """
        return position % self.dp

    def share(self, replica: int, positions: range) -> range:
        """Those of some consecutive positions of a batch that live on a replica.

        >>> RankGrid.of("ref", first=4, size=3).share(1, range(2, 8))
        range(4, 8, 3)
        """
        assert positions.step == 1, "positions that follow each other"
        wait = (replica - positions.start) % self.dp  # from the first position to the first of its
        return range(positions.start + wait, positions.stop, self.dp)

    def _indices(self, axes: Sequence[str]) -> Iterator[dict[str, int]]:
        """Every combination of indices along these axes, the first of them running fastest."""
        slowest_first = list(reversed(axes))
        for numbers in itertools.product(*(range(self.axes[axis]) for axis in slowest_first)):
            yield dict(zip(slowest_first, numbers, strict=True))


@dataclass(frozen=True, slots=True)
class Placement:
    """The grids of all roles, by their names in the order of their ranks."""

    roles: Mapping[str, RankGrid]
    colocated: bool

    @property
    def train(self) -> RankGrid:
        return self.roles["train"]

    @property
    def rollout(self) -> RankGrid:
        return self.roles["rollout"]

    @property
    def ref(self) -> RankGrid | None:
        """None without a reference."""
        return self.roles.get("ref")

    @property
    def world_size(self) -> int:
        return max(grid.first + grid.size for grid in self.roles.values())

    @property
    def grids(self) -> list[RankGrid]:
        return list(self.roles.values())

    def roles_of(self, rank: int) -> list[str]:
        return [
            role for role, grid in self.roles.items() if grid.first <= rank < grid.first + grid.size
        ]

    def first_ranks(self, limit: int) -> list[int]:
        """At most `limit` ranks, one for each role at least: all if there are no more, else the
        first ones of each role, in proportion to its size.

        With 64, of 1,024 ranks of which 512 train, 448 roll out and 64 refer, the first 31, 27 and
        4.
        """
        if self.world_size <= limit:
            return list(range(self.world_size))
        spare = limit - len(self.roles)
        found: set[int] = set()
        for grid in self.roles.values():
            count = 1 + spare * grid.size // self.world_size
            found.update(range(grid.first, grid.first + count))
        return sorted(found)

    def nodes_crossed(self, node_of_rank: Sequence[int]) -> list[str]:
        """One sentence for every tensor-parallel group that would span two nodes."""
        return [
            f"the tensor-parallel group of {role} ranks {ranks} would lie on the nodes {nodes}, but "
            "tensor parallelism must stay inside a node"
            for role, ranks, nodes in self._across_nodes("tp", node_of_rank)
        ]

    def slow_nodes_crossed(self, node_of_rank: Sequence[int]) -> list[str]:
        """For each role one sentence about the first context-parallel group that spans two nodes,
        which works, but slowly."""
        found: dict[str, str] = {}
        for role, ranks, nodes in self._across_nodes("cp", node_of_rank):
            sentence = (
                f"the context-parallel group of {role} ranks {ranks} lies on the nodes {nodes}, so that "
                "keys and values of every layer travel between them; it is faster inside a node"
            )
            found.setdefault(role, sentence)
        return list(found.values())

    def _across_nodes(
        self, axis: str, node_of_rank: Sequence[int]
    ) -> Iterator[tuple[str, list[int], list[int]]]:
        """The role, the ranks and the nodes of each group along an axis that spans several nodes."""
        for role, grid in self.roles.items():
            for ranks in grid.rank_groups(axis):
                nodes = sorted({node_of_rank[rank] for rank in ranks})
                if len(nodes) > 1:
                    yield role, ranks, nodes


@dataclass(frozen=True, slots=True)
class RoleSize:
    """How many ranks a role gets, and how they cut its model. Of rollout `ep` 1 is its TP."""

    ranks: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    num_layer_list: tuple[int, ...] = ()


def place(sizes: Mapping[str, RoleSize], colocate: bool) -> Placement:
    """Lay the roles out, in the order given.

    Colocated, each role spans the same ranks, so all sizes must be equal.
    BadInput when a size is not a multiple of its TP * PP, rollout's EP not one of its TP, or colocated
    sizes differ.
    """
    if colocate and len({size.ranks for size in sizes.values()}) > 1:
        found = ", ".join(f"{role} {size.ranks}" for role, size in sizes.items())
        raise BadInput(
            "colocated roles share all ranks, so their sizes must be equal; found " + found
        )
    first = 0
    roles = {}
    for role, asked in sizes.items():
        size = asked
        if role == "rollout":
            size = replace(asked, ep=asked.tp if asked.ep == 1 else asked.ep)
        _check_size(role, size)
        roles[role] = RankGrid.of(
            role,
            0 if colocate else first,
            size.ranks,
            size.tp,
            size.pp,
            size.cp,
            size.ep,
            size.num_layer_list,
        )
        first += size.ranks
    return Placement(MappingProxyType(roles), colocate)


def _check_size(role: str, size: RoleSize) -> None:
    model = size.tp * size.cp * size.pp
    if size.ranks < 1 or size.ranks % model:
        whole = size.ranks // model
        works = sorted({max(1, whole) * model, (whole + 1) * model})
        cut = f"TP {size.tp} x PP {size.pp}"
        if size.cp > 1:
            cut = f"TP {size.tp} x CP {size.cp} x PP {size.pp}"
        raise BadInput(
            f"{role} has {size.ranks} ranks, which is not a multiple of {cut}; "
            f"{' or '.join(map(str, works))} would work"
        )
    if role == "rollout" and size.ep % size.tp:
        raise BadInput(
            f"rollout has EP {size.ep} and TP {size.tp}: EP must be a multiple of TP, since each rank of "
            f"a replica holds whole experts; {size.tp} would work"
        )
    stages = len(size.num_layer_list)
    assert stages in (0, size.pp), f"{role}: the layers of {stages} stages for PP {size.pp}"
