"""Which rank does what: pure arithmetic on ranks, no torch, no environment.

A role is a set of consecutive ranks laid out as a grid. Tensor parallel runs fastest and pipeline
stages slowest (Megatron's order tp-dp-pp), so with TP2 PP4 rank r of a role has TP index r % 2 and
stage r // 2. Roles follow each other in the order train, rollout, ref; when colocated, every role
spans the whole world.
"""

from __future__ import annotations

from dataclasses import dataclass

from r1zero.errors import BadInput

ROLES = ("train", "rollout", "ref")


@dataclass(frozen=True, slots=True)
class Span:
    """The ranks of one role and their grid."""

    role: str
    first: int
    size: int
    tp: int
    pp: int

    @property
    def dp(self) -> int:
        """Number of replicas of the model."""
        return self.size // (self.tp * self.pp)

    @property
    def ranks(self) -> list[int]:
        return list(range(self.first, self.first + self.size))

    def rank_at(self, tp: int, dp: int, pp: int) -> int:
        return self.first + tp + self.tp * (dp + self.dp * pp)

    def coords(self, rank: int) -> tuple[int, int, int]:
        """(TP index, replica, stage) of a rank of this role."""
        local = rank - self.first
        assert 0 <= local < self.size, f"rank {rank} is not a {self.role} rank"
        return local % self.tp, local // self.tp % self.dp, local // (self.tp * self.dp)

    def lines(self, axis: str) -> list[list[int]]:
        """All groups of ranks that differ only along `axis`: tp, dp, pp, or replica (tp and pp)."""
        tps, dps, pps = range(self.tp), range(self.dp), range(self.pp)
        if axis == "tp":
            return [[self.rank_at(t, d, p) for t in tps] for p in pps for d in dps]
        if axis == "dp":
            return [[self.rank_at(t, d, p) for d in dps] for p in pps for t in tps]
        if axis == "pp":
            return [[self.rank_at(t, d, p) for p in pps] for d in dps for t in tps]
        assert axis == "replica", axis
        return [self.replica(d) for d in dps]

    def replica(self, dp: int) -> list[int]:
        """Ranks that hold one copy of the model; the first is its leader, which receives for it."""
        return [self.rank_at(t, dp, p) for p in range(self.pp) for t in range(self.tp)]

    def speaker(self, dp: int) -> int:
        """The rank of a replica where results appear: TP index 0 of the last stage."""
        return self.rank_at(0, dp, self.pp - 1)


@dataclass(frozen=True, slots=True)
class Placement:
    """The spans of the three roles in a world of `world_size` ranks."""

    train: Span
    rollout: Span
    ref: Span
    colocated: bool

    @property
    def world_size(self) -> int:
        return self.train.size if self.colocated else self.train.size + self.rollout.size + self.ref.size

    @property
    def spans(self) -> tuple[Span, Span, Span]:
        return self.train, self.rollout, self.ref

    def roles_of(self, rank: int) -> list[str]:
        return [span.role for span in self.spans if rank in span.ranks]

    def nodes_crossed(self, node_of_rank: list[int]) -> list[str]:
        """One sentence for every tensor-parallel group that would span two nodes."""
        found = []
        for span in self.spans:
            for line in span.lines("tp"):
                nodes = sorted({node_of_rank[rank] for rank in line})
                if len(nodes) > 1:
                    found.append(f"the tensor-parallel group of {span.role} ranks {line} would lie on the nodes "
                                 f"{nodes}, but tensor parallelism must stay inside a node")
        return found


def place(train: tuple[int, int, int], rollout: tuple[int, int], ref: tuple[int, int, int],
          colocate: bool) -> Placement:
    """Lay the roles out. Arguments are (ranks, TP, PP); rollout has no PP.

    Colocated, each role spans the same ranks, so the three sizes must be equal.
    BadInput when a size is not a multiple of its TP * PP or colocated sizes differ.
    """
    sizes = {"train": train, "rollout": (*rollout, 1), "ref": ref}
    if colocate and len({size for size, _, _ in sizes.values()}) > 1:
        raise BadInput("colocated roles share all ranks, so their sizes must be equal; found "
                       + ", ".join(f"{role} {size}" for role, (size, _, _) in sizes.items()))
    first, spans = 0, []
    for role, (size, tp, pp) in sizes.items():
        grid, full = tp * pp, size // (tp * pp)
        if size < 1 or size % grid:
            works = sorted({max(1, full) * grid, (full + 1) * grid})
            raise BadInput(f"{role} has {size} ranks, which is not a multiple of TP {tp} x PP {pp}; "
                           f"{' or '.join(map(str, works))} would work")
        spans.append(Span(role, 0 if colocate else first, size, tp, pp))
        first += size
    return Placement(*spans, colocated=colocate)
