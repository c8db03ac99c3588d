"""Process groups: all of the world, made once, and this rank's place in each role's device mesh.

Two planes. The control plane is gloo on the CPU: plans, samples, metrics, and all waiting. The
tensor plane is the device's backend: Megatron's groups inside a role and the groups that publish
weights. Ranks wait for each other on the control plane and enter a device collective only when all
its members are about to, since HCCL gives up on a long wait without saying why.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from r1zero.distributed import collectives
from r1zero.distributed.device import Device, warm_up
from r1zero.distributed.launch import Launch
from r1zero.distributed.npu_environment import group_limit, tensor_megabytes
from r1zero.distributed.placement import Placement, RankGrid
from r1zero.distributed.rendezvous import join
from r1zero.distributed.watchdog import FailureWatch
from r1zero.errors import BadInput

SMALL_BUFFER = 16  # MB of device memory for a communicator in which scalars travel


@dataclass(frozen=True)
class Grid:
    """One role as this rank sees it. On ranks outside the role only `span` may be used."""

    span: RankGrid
    member: bool
    tp_index: int = 0
    replica: int = 0
    stage: int = 0
    # tensor plane: tp dp pp mp all embd
    groups: dict[str, dist.ProcessGroup] = field(default_factory=dict)
    # gloo over all ranks of the role; on devices it carries their tensors, too
    role_control: dist.ProcessGroup | None = None
    replica_control: dist.ProcessGroup | None = None  # gloo over this rank's replica

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.span.pp - 1

    @property
    def is_input_rank(self) -> bool:
        """True on the rank that receives for its replica."""
        return self.member and self.tp_index == 0 and self.stage == 0

    @property
    def is_output_rank(self) -> bool:
        """True on the rank where its replica's results appear."""
        return self.member and self.tp_index == 0 and self.is_last_stage

    def share(self, count: int) -> range:
        """The positions, out of `count`, that this rank's replica works on: see RankGrid.share.
        None of them outside the role."""
        if not self.member:
            return range(0)
        return self.span.share(self.replica, range(count))

    @contextlib.contextmanager
    def as_default_group(self) -> Iterator[None]:
        """Let the role's control group stand as torch's default group.

        Megatron's optimizer set-up and dist_checkpointing talk to the default group whatever groups
        they are given; over the whole world they would wait for ranks that never come. The rank
        table is renumbered too, since torch translates "global" ranks through it.
        """
        assert self.role_control is not None
        world = c10d._get_default_group()
        table = c10d._world.pg_group_ranks
        ranks = table[self.role_control]
        table[self.role_control] = {rank: rank for rank in range(self.span.size)}
        c10d._update_default_pg(self.role_control)
        try:
            yield
        finally:
            c10d._update_default_pg(world)
            table[self.role_control] = ranks


class World:
    """All ranks, cut into roles. Built by every rank at once; one per process."""

    def __init__(
        self,
        launch: Launch,
        placement: Placement,
        device: Device,
        timeout: timedelta,
        store: dist.Store | None = None,
    ) -> None:
        """Join the job and build all groups of the roles. `store` replaces the network
        rendezvous."""
        assert launch.world_size == placement.world_size, "the placement is for another world size"
        self.launch = launch
        self.placement = placement
        self.device = device
        self.timeout = timeout
        self.rank = launch.rank
        self.size = launch.world_size
        self.watch: FailureWatch | None = None  # over the failures of ranks, where one was set up
        self._groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup | None] = {}
        _join_everyone(launch, timeout, store or join(launch, timeout.total_seconds()))
        self.store = c10d._get_default_store()
        everyone = list(range(self.size))
        everyone_control = dist.group.WORLD
        assert everyone_control is not None, "the default group was just made"
        self.control = everyone_control
        self._groups["gloo", tuple(everyone)] = self.control
        self.roles = {role: self._build(span) for role, span in placement.roles.items()}

    @property
    def train(self) -> Grid:
        return self.roles["train"]

    @property
    def rollout(self) -> Grid:
        return self.roles["rollout"]

    @property
    def ref(self) -> Grid:
        return self.roles["ref"]

    @property
    def is_controller(self) -> bool:
        return self.rank == 0

    @property
    def role_names(self) -> str:
        """This rank's roles, for messages: "train", or "train+rollout+ref"."""
        return "+".join(self.placement.roles_of(self.rank))

    def tensor_group(self, ranks: Sequence[int], buffer_megabytes: int) -> dist.ProcessGroup | None:
        """The device group over these ranks, made and warmed up at its first mention; None outside
        it.

        Collective: all ranks of the world must ask for the same groups in the same order.
        """
        return self._group(self.device.backend, ranks, buffer_megabytes)

    def barrier(self) -> None:
        """Wait for all ranks on the control plane."""
        collectives.barrier(self.control)

    def leave(self) -> None:
        """Leave together, so that no rank takes the store away while another still needs it."""
        self.barrier()
        dist.destroy_process_group()

    def _group(
        self,
        backend: str,
        ranks: Sequence[int],
        buffer_megabytes: int = 0,
        decodes: bool = False,
    ) -> dist.ProcessGroup | None:
        key = (backend, tuple(ranks))
        if key not in self._groups:
            device_plane = backend == self.device.backend and not self.device.is_cpu
            if backend != "gloo":
                options = self.device.group_options(buffer_megabytes, decodes)
                timeout = group_limit(self.timeout)
            else:
                options = None
                timeout = self.timeout
            made = dist.new_group(list(ranks), timeout=timeout, backend=backend, pg_options=options)
            member = self.rank in ranks
            self._groups[key] = made if member else None
            if member and device_plane:
                warm_up(made, self.device)
        return self._groups[key]

    def _build(self, span: RankGrid) -> Grid:
        """Make the groups of one role: every rank makes all of them, in one order."""
        mine: dict[str, dist.ProcessGroup] = {}

        def make(
            name: str,
            lines: list[list[int]],
            backend: str,
            buffer_megabytes: int,
            decodes: bool = False,
        ) -> None:
            for ranks in lines:
                group = self._group(backend, ranks, buffer_megabytes, decodes)
                if self.rank in ranks:
                    assert group is not None
                    mine[name] = group

        # Saving a checkpoint, Megatron sends a flag from device to device over its default group,
        # which this one stands for. Its device half is not warmed up: most jobs never use it, and
        # where it is used all its ranks come at once.
        make("role_control", [span.ranks], self.device.control_backend, SMALL_BUFFER)
        make("replica_control", span.replicas(), "gloo", 0)
        large = tensor_megabytes(os.environ)
        decodes = span.role == "rollout" and span.tp > 1
        make("tp", span.rank_groups("tp"), self.device.backend, large, decodes)
        for axis in ("dp", "pp"):
            make(axis, span.rank_groups(axis), self.device.backend, large)
        make("mp", span.replicas(), self.device.backend, SMALL_BUFFER)
        make("all", [span.ranks], self.device.backend, SMALL_BUFFER)
        make(
            "embd",
            [sorted({line[0], line[-1]}) for line in span.rank_groups("pp")],
            self.device.backend,
            large,
        )
        make("self", [[rank] for rank in span.ranks], self.device.backend, SMALL_BUFFER)
        if self.rank not in span.ranks:
            return Grid(span, member=False)
        index = span.index_of(self.rank)
        return Grid(
            span,
            True,
            index["tp"],
            index["dp"],
            index["pp"],
            mine,
            mine.pop("role_control"),
            mine.pop("replica_control"),
        )


def _join_everyone(launch: Launch, timeout: timedelta, store: dist.Store) -> None:
    """Make the default group, gloo over all ranks. BadInput when this machine's network does not
    allow it."""
    try:
        dist.init_process_group(
            "gloo", store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        # gloo's, which has no types of its own for what went wrong
        reason = str(error).splitlines()[0].rpartition("] ")[2]
        interface = os.environ.get("GLOO_SOCKET_IFNAME")
        if interface:
            way_out = (
                f"GLOO_SOCKET_IFNAME={interface} must name a network interface that reaches the "
                "other nodes"
            )
        else:
            way_out = "set GLOO_SOCKET_IFNAME to the network interface that reaches the other nodes"
        raise BadInput(
            f"rank {launch.rank} on {socket.gethostname()} could not join the others ({reason}); "
            f"{way_out}"
        ) from error
