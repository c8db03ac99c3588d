"""Environment variables of Ascend NPUs (torch_npu, HCCL, CANN): what each does, and our defaults.

Every rank sets them for itself before its device is opened, however it was started: launch.sh,
torchrun and srun need no list of their own. A variable that the user has set keeps its value. What
must be there before Python starts (jemalloc, OMP_NUM_THREADS) is in tools/environment.sh. The
meanings are those of the public documentation of torch_npu and CANN; no default was measured on
hardware. docs/environment.md tells users the same at length.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

# What the variables do that a run is likely to set. The doctor prints the line.
MEANINGS = {
    "TASK_QUEUE_ENABLE": "queue of operators: 0 none, 1 as graphs need it, 2 faster but no graphs",
    "PYTORCH_NPU_ALLOC_CONF": "options of the allocator of device memory",
    "PYTORCH_ALLOC_CONF": "the same, where torch_npu reads it; only one of the two may be set there",
    "CPU_AFFINITY_CONF": "cores of a rank: 0 all, 1 its NPU's share, 2 one for each busy thread",
    "HCCL_CONNECT_TIMEOUT": "seconds in which the ranks of a group must have connected",
    "HCCL_EXEC_TIMEOUT": "seconds that a rank waits for others in a collective; 0 is for ever",
    "HCCL_EVENT_TIMEOUT": "seconds that a stream waits for an event; longer than HCCL_EXEC_TIMEOUT",
    "HCCL_BUFFSIZE": "MB of device memory, taken twice, of a group in which tensors travel",
    "P2P_HCCL_BUFFSIZE": "MB, taken twice, of a pair of ranks; 0 lets it use the group's",
    "HCCL_OP_EXPANSION_MODE": "where HCCL's algorithms run; set, it holds for all groups",
    "HCCL_DETERMINISTIC": "sums in one order: false, true or strict",
    "HCCL_SOCKET_IFNAME": "network interface of HCCL",
    "HCCL_IF_IP": "address of HCCL on this node; wins over HCCL_SOCKET_IFNAME",
    "HCCL_IF_BASE_PORT": "first of 16 ports of HCCL on the host",
    "GLOO_SOCKET_IFNAME": "network interface of the control plane",
    "RANK_TABLE_FILE": "file that says which rank is where; no effect here",
    "ASCEND_RT_VISIBLE_DEVICES": "NPUs that a process sees",
    "ASCEND_LAUNCH_BLOCKING": "whether every operator waits for its end (1), for debugging",
    "INF_NAN_MODE_ENABLE": "whether overflows become infinite (1) or the largest number (0)",
    "MULTI_STREAM_MEMORY_REUSE": "whether memory of one stream is reused early on another (1)",
    "TORCH_NPU_FALLBACK_CPU_DISABLE": "whether an operator without a kernel is an error (1)",
    "CUDA_DEVICE_MAX_CONNECTIONS": "Megatron's sequence parallelism asks for 1, on NPUs, too",
    "OMP_NUM_THREADS": "threads of a rank on the host",
    "LD_PRELOAD": "libraries that go before others, such as jemalloc",
}
# What is done by other means than the variable.
BY_OPTION = {"HCCL_OP_EXPANSION_MODE": "AIV for tensor-parallel groups of rollout alone"}
# The first torch_npu that is known to read PYTORCH_ALLOC_CONF, and to end the process where
# PYTORCH_NPU_ALLOC_CONF is set beside it. The library of 2.7.1.post4 has only the second name.
READS_ALLOC_CONF = Version("2.10.0.post7")
# What torch_npu's own limit of a group leaves HCCL, whose limit comes first, to write what hangs.
TO_WRITE_WHY = timedelta(minutes=2)
# HCCL's own default, which the groups in which tensors travel ask for by name.
BUFFER_MEGABYTES = 200
VECTOR_CORES = 3  # of the option hccl_op_expansion_mode: AIV


@dataclass(frozen=True, slots=True)
class Row:
    """A variable as a run would have it."""

    name: str
    value: str
    is_users: bool  # else it is our default
    meaning: str


def present() -> dict[str, str]:
    """Those of the variables that are set in this process."""
    return {name: os.environ[name] for name in MEANINGS if name in os.environ}


def defaults(generates: bool, wait: timedelta) -> dict[str, str]:
    """What we set on a rank.

    `generates` on ranks that roll out. `wait` is how long ranks wait for one another,
    `training.distributed_timeout_minutes`.
    """
    return {
        # Decoding steps are captured as graphs, and torch_npu captures none with level 2.
        "TASK_QUEUE_ENABLE": "1" if generates else "2",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        # Not 2: it ties the main thread to one core, and the reward workers that it starts, too.
        # Bound late, which is torch_npu's default, the main thread would be bound only when another
        # thread uses the device: that of a backward pass, which only train ranks have.
        "CPU_AFFINITY_CONF": "1,lazy_bind:0",
        "HCCL_CONNECT_TIMEOUT": "1800",
        "HCCL_EXEC_TIMEOUT": str(math.ceil(wait.total_seconds())),
        "HCCL_BUFFSIZE": str(BUFFER_MEGABYTES),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }


def group_limit(wait: timedelta) -> timedelta:
    """The time limit of groups on devices, which torch_npu's watchdog keeps.

    It must be longer than HCCL_EXEC_TIMEOUT: the watchdog ends the process, and HCCL writes which
    rank it waited for only when its own limit comes first. torch_npu warns of each group where it
    does not.
    """
    return wait + TO_WRITE_WHY


def set_defaults(environ: MutableMapping[str, str], generates: bool, wait: timedelta) -> None:
    """Set what the user has not: see defaults. Call before the device is opened."""
    for name, value in missing(environ, defaults(generates, wait)).items():
        environ[name] = value


def missing(environ: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    """What is wanted and neither set nor made wrong by what is set."""
    taken = set(environ)
    if "PYTORCH_ALLOC_CONF" in environ and reads_alloc_conf():
        taken.add("PYTORCH_NPU_ALLOC_CONF")
    return {name: value for name, value in wanted.items() if name not in taken}


@functools.cache
def reads_alloc_conf() -> bool:
    """Whether the installed torch_npu is known to read PYTORCH_ALLOC_CONF. Without importing it,
    since it reads the variables that are to be set first."""
    try:
        return Version(version("torch_npu")) >= READS_ALLOC_CONF
    except PackageNotFoundError:
        return False


def environment_table(environ: Mapping[str, str], wait: timedelta) -> list[Row]:
    """The variables that the user has set, and our defaults for the others."""
    where_generated = missing(environ, defaults(True, wait))
    elsewhere = missing(environ, defaults(False, wait))
    rows = []
    for name, meaning in MEANINGS.items():
        if name in environ:
            rows.append(Row(name, environ[name], True, meaning))
        elif name in elsewhere:
            value = elsewhere[name]
            if value != where_generated[name]:
                value = f"{where_generated[name]} on ranks that generate, {value} on others"
            rows.append(Row(name, value, False, meaning))
        elif name in BY_OPTION:
            rows.append(Row(name, BY_OPTION[name], False, meaning))
    return rows


def tensor_megabytes(environ: Mapping[str, str]) -> int:
    """MB for a group in which tensors travel: HCCL_BUFFSIZE, handed on, since the options of a group
    win over variables."""
    text = environ.get("HCCL_BUFFSIZE", "")
    if text.isdecimal():
        return int(text)
    return BUFFER_MEGABYTES


def group_config(environ: Mapping[str, str], megabytes: int, decodes: bool) -> dict[str, int]:
    """Options of an HCCL group (`hccl_config` of torch_npu).

    A group that sums while tokens are decoded asks for AIV: its algorithms run on the vector cores,
    without a launch from elsewhere, which is quicker for small sums. HCCL allows that for inference,
    and for one group of a rank at a time, so it is no variable, which would hold for all of them.
    A user's HCCL_OP_EXPANSION_MODE wins.
    """
    config = {"hccl_buffer_size": max(1, megabytes)}
    if decodes and "HCCL_OP_EXPANSION_MODE" not in environ:
        config["hccl_op_expansion_mode"] = VECTOR_CORES
    return config
