"""The launcher's environment (torchrun, srun, or none): rank, world size, master address.

torchrun's variables win, so that `srun torchrun ...` works too; Slurm's are used when they are
absent; without either the process is a world of one. One rank needs nobody to meet: whatever stands
around it, such as the variables of `srun --pty bash` or of a pod, it is a world of one, too.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from dataclasses import dataclass

from r1zero.errors import BadInput


@dataclass(frozen=True, slots=True)
class Launch:
    """This process's place in the job."""

    launcher: str  # "torchrun", "slurm" or "single"
    rank: int
    world_size: int
    local_rank: int
    node_of_rank: tuple[int, ...]  # [world]
    address: str  # of rank 0
    port: int

    @property
    def known_nodes(self) -> tuple[int, ...] | None:
        """Node of each rank, if there is a launcher that knows."""
        if self.launcher == "single":
            return None
        return self.node_of_rank

    @property
    def is_first(self) -> bool:
        """True in the process that prints for the job."""
        return self.rank == 0

    @property
    def other_node(self) -> str:
        """`node 1: ` in the first process of a node without rank 0, which may know more; else
        ""."""
        node = self.node_of_rank[self.rank]
        nodes = self.node_of_rank
        if node != nodes[0] and nodes.index(node) == self.rank:
            return f"node {node}: "
        return ""


GLOO_INTERFACES = "GLOO_SOCKET_IFNAME"
ALONE = Launch("single", 0, 1, 0, (0,), "127.0.0.1", 0)


def read_launch() -> Launch:
    """Read the place of this process from the environment. BadInput when it is incomplete."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if _read("WORLD_SIZE") != 1:
            return _from_torchrun()
        return ALONE
    if _in_slurm_step():
        if _read("SLURM_STEP_NUM_TASKS") != 1:
            return _from_slurm()
        return ALONE
    return ALONE


def launched() -> bool:
    """Whether a launcher has started this very process as one of several ranks.

    RANK and WORLD_SIZE do not say so by themselves: pods of PyTorchJob and Volcano have them, with
    other meanings, and they stay behind in shells. Launchers of ranks set LOCAL_RANK, too.
    """
    by_torchrun = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()
    return by_torchrun or (_in_slurm_step() and os.environ["SLURM_STEP_NUM_TASKS"] != "1")


def _in_slurm_step() -> bool:
    return "SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ


def hush_torch() -> None:
    """Let torch's C++ side tell of errors only, unless the user says otherwise; call before
    importing torch.

    When a rank ends, it would print the stack of each lost connection on all others, and bury the
    cause.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def check_interfaces() -> list[str]:
    """Return a sentence if gloo is told to use a network interface that this machine does not
    have."""
    present = [name for _, name in socket.if_nameindex()]
    problems = []
    for name in filter(None, os.environ.get(GLOO_INTERFACES, "").split(",")):
        if name not in present:
            problems.append(
                f"{GLOO_INTERFACES}={os.environ[GLOO_INTERFACES]}: there is no network interface "
                f"{name} here, and gloo takes names only, no ^ as NCCL does; give one of "
                f"{', '.join(present)}, or unset it"
            )
    return problems[:1]


def announced_world_size() -> int | None:
    """World size that the launcher is about to start (NNODES x NPROC_PER_NODE), when the caller
    says so."""
    text = os.environ.get("NPROC_PER_NODE")
    if text is None:
        return None
    return _integer("NPROC_PER_NODE", text) * _read("NNODES", 1)


def _from_torchrun() -> Launch:
    rank = _read("RANK")
    size = _read("WORLD_SIZE")
    local_size = _read("LOCAL_WORLD_SIZE", size)
    if not 0 <= rank < size:
        raise BadInput(f"RANK={rank} must be from 0 to {size - 1}, since WORLD_SIZE={size}")
    if local_size < 1 or size % local_size:
        raise BadInput(
            f"WORLD_SIZE={size} is not a multiple of LOCAL_WORLD_SIZE={local_size}: "
            "start the same number of processes on every node"
        )
    nodes = tuple(r // local_size for r in range(size))
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    return Launch(
        "torchrun", rank, size, _read("LOCAL_RANK", rank % local_size), nodes, address, _port()
    )


def _from_slurm() -> Launch:
    size = _read("SLURM_STEP_NUM_TASKS")
    nodes = tuple(node for node, tasks in enumerate(_tasks_per_node()) for _ in range(tasks))
    if len(nodes) != size:
        raise BadInput(
            f"SLURM_STEP_TASKS_PER_NODE describes {len(nodes)} tasks but "
            f"SLURM_STEP_NUM_TASKS={size}"
        )
    if os.environ.get("SLURM_DISTRIBUTION", "block").startswith("cyclic"):
        raise BadInput(
            "srun --distribution=cyclic deals neighbouring ranks out to different nodes; say "
            "block, and a replica's ranks stay together"
        )
    address = os.environ.get("MASTER_ADDR") or _first_slurm_node()
    # One port for all tasks of this step, and another for the next step of the same job.
    default_port = 20000 + (_read("SLURM_JOB_ID") * 64 + _read("SLURM_STEP_ID", 0) % 64) % 20000
    return Launch(
        "slurm",
        _read("SLURM_PROCID"),
        size,
        _read("SLURM_LOCALID"),
        nodes,
        address,
        _port(default_port),
    )


def _port(default: int | None = None) -> int:
    """MASTER_PORT, where rank 0 listens."""
    port = _read("MASTER_PORT", default)
    if not 1 <= port <= 65535:
        raise BadInput(f"the environment variable MASTER_PORT={port} must be from 1 to 65535")
    return port


def _tasks_per_node() -> list[int]:
    """Expand Slurm's "2(x3),1" into [2, 2, 2, 1]."""
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ["SLURM_STEP_NUM_TASKS"])
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise BadInput(f"SLURM_STEP_TASKS_PER_NODE={text} is not of the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _first_slurm_node() -> str:
    """An address of the first node: its name if that resolves, else the one Slurm itself uses."""
    node_list = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    name = _scontrol("show", "hostnames", node_list).split()[0]
    try:
        socket.getaddrinfo(name, None)
        return name
    except socket.gaierror:
        match = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", name))
        if match is None:
            raise BadInput(
                f"the Slurm node {name} has no address that resolves: set MASTER_ADDR"
            ) from None
        return match[1]


def _scontrol(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        raise BadInput(
            f"`scontrol {' '.join(arguments)}` failed: set MASTER_ADDR to the first node's name"
        ) from None


def _read(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None:
        if default is None:
            raise BadInput(
                f"the environment variable {name} is not set, but RANK and WORLD_SIZE, or those "
                "of a Slurm step, are: start with torchrun or srun, or unset them for a world of "
                "one"
            )
        return default
    return _integer(name, text)


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise BadInput(f"the environment variable {name}={text} must be a whole number") from None
