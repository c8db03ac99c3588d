"""What a node has, against what the run will need of it: devices, memory, compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from r1zero.config.schema import Config
from r1zero.distributed.open_files import UNLIMITED, needed, needed_by_agent
from r1zero.preflight.found import Found
from r1zero.preflight.memory import host_memory, memory

# resident in a process with torch, Megatron and transformers loaded, without a model
PROCESS_GIGABYTES = 0.6
# Variables of NPUs that may differ from node to node.
OF_A_NODE = {
    "ASCEND_RT_VISIBLE_DEVICES",
    "CPU_AFFINITY_CONF",
    "GLOO_SOCKET_IFNAME",
    "HCCL_IF_IP",
    "HCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
}
# Devices that a backend is for. MindSpeed-LLM says nccl on Ascend, too, where torch_npu turns it
# into hccl.
BACKENDS = {"hccl": ("npu",), "nccl": ("cuda", "npu")}


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one process sees of its node. Gigabytes are 1e9 bytes."""

    host: str
    kind: str  # of device
    devices: int  # 0 on a CPU
    cores: int
    free_gigabytes: list[float]  # of each device, or of the host's memory
    versions: dict[str, str | None]
    sees_token: bool  # the file that rank 0 put where the run folder will be
    inputs: dict[str, str]  # key -> what the path looks like from here
    kernels: str  # why the CPU kernels are missing; "" if they are there
    # Of NPUs: the variables that are set here, what is wrong with them, and what is worth a look.
    environment: dict[str, str] = field(default_factory=dict)
    environment_problems: list[str] = field(default_factory=list)
    environment_notes: list[str] = field(default_factory=list)
    # Open files: how many a rank may have, and how many its launcher has.
    files: int = UNLIMITED
    launcher_files: int = UNLIMITED


def needed_gigabytes(found: Found, kind: str) -> list[float] | None:
    """The estimate of each rank on devices of a kind, all its roles together; None when the roles do
    not fit the world or a model's shape is not known."""
    placed = found.placement
    policy = found.actor.shape
    reference = found.reference_shape
    reward = found.reward_shape
    if placed is None or policy is None or (reference is None and placed.ref is not None):
        return None
    if found.reward_model is not None and reward is None:
        return None
    by_role = memory(found.config, placed, policy, reference, reward)
    sizes = {role: item.total for role, item in by_role.items()}
    if kind == "cpu":  # whose memory is that of the host
        sizes["train"] += host_memory(found.config, placed, policy).total
    result = []
    for rank in range(placed.world_size):
        result.append(sum(sizes[role] for role in placed.roles_of(rank)) / 1e9)
    return result


def check_devices(cfg: Config, node: NodeReport, local_ranks: int) -> list[str]:
    """The devices of a node against its ranks and the backend that is asked for."""
    backend = cfg.training.distributed_backend
    if backend in BACKENDS and node.kind not in BACKENDS[backend]:
        return [
            f"training.distributed_backend: {backend} needs {BACKENDS[backend][0].upper()}s, but "
            f"{node.host} offers {node.kind.upper()} only; training.distributed_backend=gloo runs "
            "on CPUs"
        ]
    if node.kind != "cpu" and backend != "gloo" and node.devices < local_ranks:
        return [
            f"{node.host} has {node.devices} {node.kind.upper()}s for {local_ranks} ranks; start "
            f"at most {node.devices} a node, or make more visible (ASCEND_RT_VISIBLE_DEVICES, "
            "CUDA_VISIBLE_DEVICES)"
        ]
    return []


def check_open_files(
    node: NodeReport, world_size: int, has_rank_0: bool, launcher: str
) -> list[str]:
    """The limits of open files of a node against the connections of its ranks."""
    rank = needed(world_size, has_rank_0)
    if node.files < rank:
        whose = "rank 0" if has_rank_0 else "a rank"
        return [
            f"{node.host}: {whose} of a world of {world_size} needs about {rank} open files, most of "
            f"them connections to other ranks, and at most {node.files} are allowed; raise the "
            "hard limit (`nofile` in /etc/security/limits.conf, `LimitNOFILE` of the service, "
            "`--ulimit nofile=` of the container)"
        ]
    agent = needed_by_agent(world_size)
    if launcher == "torchrun" and has_rank_0 and node.launcher_files < agent:
        return [
            f"{node.host}: torchrun, which every rank connects to, needs about {agent} open files, "
            f"and its shell allows {node.launcher_files}; run ulimit -n {agent} before it"
        ]
    return []


def check_memory(node: NodeReport, needed: Mapping[int, float]) -> list[str]:
    """Free memory of a node against the estimate of its ranks, by rank in the order of their
    devices."""
    way_out = (
        "lower actor_rollout.max_tokens_to_oom or micro_batch_size, set "
        "actor_rollout.recompute_granularity=full, or use more ranks (`--dry-run` shows "
        "the parts)"
    )
    if node.kind == "cpu":
        total = sum(needed.values()) + PROCESS_GIGABYTES * len(needed)
        free = node.free_gigabytes[0]
        if total <= free:
            return []
        return [
            f"{node.host}: {len(needed)} ranks need about {total:.1f} GB of memory, and "
            f"{free:.1f} GB are free; {way_out}"
        ]
    return [
        f"{node.host}: rank {rank} needs about {size:.1f} GB, and its {node.kind.upper()} has "
        f"{free:.1f} GB free; end what else runs there, or {way_out}"
        for (rank, size), free in zip(needed.items(), node.free_gigabytes, strict=False)
        if size > free
    ]


def memory_notes(cfg: Config, node: NodeReport) -> list[str]:
    """What a configuration does about memory that does not help on this node."""
    if not cfg.training.optimizer_offload or node.kind != "cpu":
        return []
    return [
        f"{node.host}: training.optimizer_offload saves nothing on a CPU, whose memory is that of the "
        "host; leave it out"
    ]


def check_alike(nodes: Sequence[NodeReport]) -> list[str]:
    """What must be the same on all nodes: versions, variables, the run folder, the inputs."""
    first = nodes[0]
    problems = []
    for node in nodes[1:]:
        problems += [
            f"{name} is {node.versions.get(name)} on {node.host} and {found} on {first.host}; "
            "install the same on all nodes"
            for name, found in sorted(first.versions.items())
            if node.versions.get(name) != found
        ]
        problems += _other_environment(first, node)
        if not node.sees_token:
            problems.append(
                f"output_dir: {node.host} does not see what {first.host} writes there; name a "
                "folder that all nodes share"
            )
        problems += [
            f"{key}: looks different on {node.host} ({node.inputs.get(key)}) and {first.host} "
            f"({look}); put it on a folder that all nodes share, or copy it whole to the same path"
            for key, look in first.inputs.items()
            if node.inputs.get(key) != look
        ]
    return problems


def _other_environment(first: NodeReport, node: NodeReport) -> list[str]:
    """Variables that are not the same on two nodes."""
    problems = []
    for name in sorted((first.environment.keys() | node.environment.keys()) - OF_A_NODE):
        here = node.environment.get(name, "not set")
        there = first.environment.get(name, "not set")
        if here != there:
            problems.append(
                f"{name} is {here} on {node.host} and {there} on {first.host}; set the same on all "
                "nodes"
            )
    return problems


def fingerprint(path: str) -> str:
    """What a file or folder looks like: names and sizes, not contents, which would take long."""
    here = Path(path)
    if here.is_dir():
        files = [entry for entry in here.iterdir() if entry.is_file()]
        return f"{len(files)} files of {sum(entry.stat().st_size for entry in files)} bytes"
    if here.exists():
        return f"{here.stat().st_size} bytes"
    return "missing"
