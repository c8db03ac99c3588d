"""Process groups: those that this rank is in, made once, and its place in each role's device mesh.

Which they are is in group_list. Only its members make a group, so that a rank of thousands makes a
dozen of them.

Two planes. The control plane is gloo on the CPU: plans, samples, metrics, and all waiting. The
tensor plane is the device's backend: Megatron's groups inside a role and the groups that publish
weights. Ranks wait for each other on the control plane and enter a device collective only when all
its members are about to, since HCCL gives up on a long wait without saying why.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from r1zero.distributed import collectives
from r1zero.distributed.device import Device, warm_up
from r1zero.distributed.group_list import BOTH, DEVICE, HOST, PlannedGroup, groups_of
from r1zero.distributed.launch import Launch
from r1zero.distributed.npu_environment import group_limit, tensor_megabytes
from r1zero.distributed.placement import Placement, RankGrid
from r1zero.distributed.rendezvous import join
from r1zero.distributed.watchdog import FailureWatch
from r1zero.errors import BadInput

# Whether gloo connects two ranks when they first talk, and not all at start. torch reads it from 2.8
# on.
LAZY_GLOO = "TORCH_GLOO_LAZY_INIT"
JOINED = "r1zero/joined"  # in the store
_MADE_APART = itertools.count()  # numbers of groups that others than torch name


@dataclass(frozen=True)
class Grid:
    """One role as this rank sees it. On ranks outside the role only `span` may be used."""

    span: RankGrid
    member: bool
    tp_index: int = 0
    replica: int = 0
    stage: int = 0
    cp_index: int = 0
    place_in_stage: int = 0  # number of this rank among those of its pipeline stage
    expert_index: int = 0  # which of the EP parts of the experts this rank holds
    # by the names of group_list, those that the role uses but for the next two
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
        return self.member and self.tp_index == 0 and self.cp_index == 0 and self.stage == 0

    @property
    def is_output_rank(self) -> bool:
        """True on the rank where its replica's results appear."""
        return self.member and self.tp_index == 0 and self.cp_index == 0 and self.is_last_stage

    def share(self, stop: int, start: int = 0) -> range:
        """The positions from `start` up to `stop` that this rank's replica works on: see
        RankGrid.share. None of them outside the role."""
        if not self.member:
            return range(0)
        return self.span.share(self.replica, range(start, stop))

    @contextlib.contextmanager
    def as_default_group(self) -> Iterator[None]:
        """Let the role's control group stand as torch's default group.

        Megatron's optimizer set-up and dist_checkpointing talk to the default group whatever groups
        they are given; over the whole world they would wait for ranks that never come.
        """
        assert self.role_control is not None
        with _standing_as_default(self.role_control):
            yield

    @contextlib.contextmanager
    def replica_as_default_group(self) -> Iterator[None]:
        """Let the replica's control group stand as torch's default group, for an engine that takes
        all ranks it sees for its own.

        What groups it makes meanwhile are not among those that torch counts: the count names the next
        group of the whole world, and ranks that count otherwise would wait for one another under
        different names.
        """
        assert self.replica_control is not None
        with _standing_as_default(self.replica_control), _named_apart(self.replica_control):
            yield


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
        """Join the job and make this rank's groups. `store` replaces the network rendezvous."""
        assert launch.world_size == placement.world_size, "the placement is for another world size"
        self.launch = launch
        self.placement = placement
        self.device = device
        self.timeout = timeout
        self.rank = launch.rank
        self.size = launch.world_size
        self.watch: FailureWatch | None = None  # over the failures of ranks, where one was set up
        self._groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}
        _join_everyone(launch, timeout, store or join(launch, timeout.total_seconds()))
        self.store = c10d._get_default_store()
        everyone = list(range(self.size))
        everyone_control = dist.group.WORLD
        assert everyone_control is not None, "the default group was just made"
        self.control = everyone_control
        self._groups["gloo", tuple(everyone)] = self.control
        made = self._make_groups(groups_of(placement, self.rank, tensor_megabytes(os.environ)))
        self.roles = {role: self._grid(span, made) for role, span in placement.roles.items()}

    @property
    def train(self) -> Grid:
        return self.roles["train"]

    @property
    def rollout(self) -> Grid:
        return self.roles["rollout"]

    @property
    def ref(self) -> Grid | None:
        """None without a reference."""
        return self.roles.get("ref")

    @property
    def reward(self) -> Grid | None:
        """The reward model's; None without one."""
        return self.roles.get("reward")

    @property
    def giver(self) -> Grid:
        """The role that hands groups over to train: ref, or rollout where there is no reference."""
        return self.ref or self.rollout

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

        Collective over these ranks; others need not call. Ranks that share several groups must ask
        for them in the same order.
        """
        if self.rank not in ranks:
            return None
        return self._group(
            PlannedGroup((), tuple(ranks), DEVICE, buffer_megabytes, warm=True, decodes=False)
        )

    def barrier(self) -> None:
        """Wait for all ranks on the control plane."""
        collectives.barrier(self.control)

    def leave(self) -> None:
        """Leave together, so that no rank takes the store away while another still needs it.

        With a device its groups are ended. Those of gloo alone end with the process, which is at
        hand: to close their sockets under gloo's thread has crashed a run that was through.
        """
        self.barrier()
        if any(backend != "gloo" for backend, _ in self._groups):
            dist.destroy_process_group()

    def _make_groups(self, planned: Sequence[PlannedGroup]) -> dict[str, dist.ProcessGroup]:
        """Make these groups in their order; by all their names, such as "train tp"."""
        made: dict[str, dist.ProcessGroup] = {}
        for group in planned:
            made |= dict.fromkeys(group.names, self._group(group))
        return made

    def _group(self, planned: PlannedGroup) -> dist.ProcessGroup:
        """A group that this rank is in, made at its first mention."""
        backend = self._backend(planned.plane)
        key = (backend, planned.ranks)
        if key not in self._groups:
            if backend == "gloo":
                options = None
                timeout = self.timeout
            else:
                options = self.device.group_options(planned.megabytes, planned.decodes)
                timeout = group_limit(self.timeout)
            self._groups[key] = _new_group(planned.ranks, backend, timeout, options)
            if planned.warm and not self.device.is_cpu:
                warm_up(self._groups[key], self.device)
        return self._groups[key]

    def _backend(self, plane: str) -> str:
        """torch.distributed's name for what carries the tensors of a plane."""
        return {
            HOST: "gloo",
            DEVICE: self.device.backend,
            BOTH: self.device.control_backend,
        }[plane]

    def _grid(self, span: RankGrid, made: Mapping[str, dist.ProcessGroup]) -> Grid:
        """This rank's place in a role, and its groups there."""
        if self.rank not in span.ranks:
            return Grid(span, member=False)
        index = span.index_of(self.rank)
        mine = {}
        for name, group in made.items():
            role, _, kind = name.partition(" ")
            if role == span.role:
                mine[kind] = group
        role_control = mine.pop("role_control")
        replica_control = mine.pop("replica_control")
        return Grid(
            span,
            member=True,
            tp_index=index["tp"],
            replica=index["dp"],
            stage=index["pp"],
            cp_index=index["cp"],
            place_in_stage=span.place_in_stage(self.rank),
            expert_index=span.expert_index(self.rank),
            groups=mine,
            role_control=role_control,
            replica_control=replica_control,
        )


def _new_group(
    ranks: tuple[int, ...], backend: str, timeout: timedelta, options: object | None
) -> dist.ProcessGroup:
    """Make a group, which only its members do.

    torch would name it after its ranks and the count of groups that this process is in, which
    differs between its members: they would wait for one another under different names. A rank makes
    one group of a backend over the same ranks, so that these two are the name. What else makes
    groups, all ranks together, is counted by torch as ever.
    """
    text = f"{backend} {' '.join(map(str, ranks))}"
    name = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    with _naming_groups(lambda: name):
        return dist.new_group(
            list(ranks),
            timeout=timeout,
            backend=backend,
            pg_options=options,
            use_local_synchronization=True,
        )


@contextlib.contextmanager
def _standing_as_default(group: dist.ProcessGroup) -> Iterator[None]:
    """Let a group stand as torch's default group. The rank table is renumbered too, since torch
    translates "global" ranks through it."""
    world = c10d._get_default_group()
    table = c10d._world.pg_group_ranks
    ranks = table[group]
    table[group] = {rank: rank for rank in range(len(ranks))}
    c10d._update_default_pg(group)
    try:
        yield
    finally:
        c10d._update_default_pg(world)
        table[group] = ranks


@contextlib.contextmanager
def _named_apart(group: dist.ProcessGroup) -> Iterator[None]:
    """Name the groups made meanwhile after this one, whose ranks all make them in the same order."""
    with _naming_groups(lambda: f"{c10d._world.pg_names[group]}/{next(_MADE_APART)}"):
        yield


@contextlib.contextmanager
def _naming_groups(name: Callable[[], str]) -> Iterator[None]:
    """Have torch name the groups that are made meanwhile so, and not count them."""

    def named(ranks: object, use_hashed_name: bool) -> Any:  # torch's own type since 2.10
        return name()

    named_by_torch = c10d._process_group_name
    c10d._process_group_name = named
    try:
        yield
    finally:
        c10d._process_group_name = named_by_torch


def _join_everyone(launch: Launch, timeout: timedelta, store: dist.Store) -> None:
    """Make the default group, gloo over all ranks, and wait until all are in it: nobody changes a
    folder while another still looks whether it may. BadInput when this machine's network does not
    allow it."""
    # Connected at their first use, two ranks wait for each other there, and a send that shall not
    # wait would: ranks that work ahead of one another were seen to hang.
    os.environ[LAZY_GLOO] = "0"
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
    if store.add(f"{JOINED}/count", 1) == launch.world_size:
        store.set(f"{JOINED}/all", "")
    store.wait([f"{JOINED}/all"], timeout)
