"""Judgement of the environment variables of Ascend NPUs: a sentence for each that is wrong, with
the way out.

What is held against a value comes from the public documentation of torch_npu and CANN
(docs/environment.md). A judge is a function of the environment and of what the run asks for; it
returns a sentence, or "" if all is well.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from r1zero.distributed.npu_environment import MEANINGS, group_limit, reads_alloc_conf
from r1zero.errors import nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the run asks for, and what this node has, as far as judges must know."""

    wait: timedelta = timedelta(minutes=45)  # training.distributed_timeout_minutes
    graphs: bool = True  # decoding steps are captured
    interfaces: Sequence[str] = field(
        default_factory=lambda: [name for _, name in socket.if_nameindex()]
    )
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)
    # Whether torch_npu is known to read PYTORCH_ALLOC_CONF.
    reads_alloc_conf: bool = field(default_factory=reads_alloc_conf)


Judge = Callable[[Mapping[str, str], Asked], str]


def environment_problems(environ: Mapping[str, str], asked: Asked) -> list[str]:
    """A sentence for each value that breaks a run, or costs it much."""
    problems = number_problems(environ)
    for judge in PROBLEMS:
        if sentence := judge(environ, asked):
            problems.append(sentence)
    return problems


def environment_notes(environ: Mapping[str, str], asked: Asked) -> list[str]:
    """A sentence for each value that may be meant, and is worth a look."""
    notes = misspelt(environ)
    for judge in NOTES:
        if sentence := judge(environ, asked):
            notes.append(sentence)
    return notes


# -- single values --------------------------------------------------------------------------------

LARGEST = 2**31 - 1
# Smallest and largest whole number that each takes, and one that is usual.
RANGES = {
    "TASK_QUEUE_ENABLE": (0, 2, 1),
    "ASCEND_LAUNCH_BLOCKING": (0, 1, 0),
    "INF_NAN_MODE_ENABLE": (0, 1, 1),
    "HCCL_CONNECT_TIMEOUT": (120, 7200, 1800),
    "HCCL_EXEC_TIMEOUT": (0, LARGEST, 2700),
    "HCCL_EVENT_TIMEOUT": (0, LARGEST, 2760),
    "HCCL_BUFFSIZE": (1, LARGEST, 200),
    "P2P_HCCL_BUFFSIZE": (0, LARGEST, 20),
    "HCCL_IF_BASE_PORT": (1024, 65520, 60000),
    "OMP_NUM_THREADS": (1, LARGEST, 1),
}


def number_problems(environ: Mapping[str, str]) -> list[str]:
    """Values that must be whole numbers within bounds."""
    problems = []
    for name, (low, high, usual) in RANGES.items():
        text = environ.get(name)
        if text is None or (text.isdecimal() and low <= int(text) <= high):
            continue
        if high == LARGEST:
            bounds = f"from {low} on"
        else:
            bounds = f"from {low} to {high}"
        problems.append(f"{name}={text} must be a whole number {bounds}, such as {usual}")
    return problems


def number(environ: Mapping[str, str], name: str) -> int | None:
    """A value that is a whole number within its bounds; None if it is not set or is told as wrong."""
    text = environ.get(name, "")
    low, high, _ = RANGES[name]
    if text.isdecimal() and low <= int(text) <= high:
        return int(text)
    return None


# -- queue and graphs -----------------------------------------------------------------------------


def queue_for_graphs(environ: Mapping[str, str], asked: Asked) -> str:
    if asked.graphs and number(environ, "TASK_QUEUE_ENABLE") == 2:
        return (
            "TASK_QUEUE_ENABLE=2 makes torch_npu refuse to capture decoding steps as graphs; unset "
            "it (ranks that do not generate get 2 by themselves), or set "
            "actor_rollout.decode_graphs=false"
        )
    return ""


def queue_is_off(environ: Mapping[str, str], asked: Asked) -> str:
    if number(environ, "TASK_QUEUE_ENABLE") == 0:
        return (
            "TASK_QUEUE_ENABLE=0 turns the queue of operators off, so the NPU waits for the host; "
            "unset it, or set 1"
        )
    return ""


def launches_block(environ: Mapping[str, str], asked: Asked) -> str:
    if number(environ, "ASCEND_LAUNCH_BLOCKING") == 1:
        return (
            "ASCEND_LAUNCH_BLOCKING=1 lets every operator wait for its end, which is for "
            "debugging; unset it"
        )
    return ""


def overflows_are_hidden(environ: Mapping[str, str], asked: Asked) -> str:
    if number(environ, "INF_NAN_MODE_ENABLE") == 0:
        return (
            "INF_NAN_MODE_ENABLE=0 cuts overflows to the largest number, so that no gradient norm "
            "shows them; unset it, or set 1"
        )
    return ""


# -- memory ---------------------------------------------------------------------------------------


def two_allocators(environ: Mapping[str, str], asked: Asked) -> str:
    if "PYTORCH_ALLOC_CONF" in environ and "PYTORCH_NPU_ALLOC_CONF" in environ:
        return (
            "PYTORCH_ALLOC_CONF and PYTORCH_NPU_ALLOC_CONF are both set, which torch_npu "
            "2.10.0.post7 refuses, and older ones may not read the first; unset the first"
        )
    return ""


def allocator_options(environ: Mapping[str, str], asked: Asked) -> str:
    for name in ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        text = environ.get(name, "").replace(" ", "")
        options = text.split(",")
        if asked.graphs and "pin_memory_expandable_segments:True" in options:
            return (
                f"{name}={text}: torch_npu captures no graphs with pin_memory_expandable_segments; "
                "leave it out, or set actor_rollout.decode_graphs=false"
            )
        if "expandable_segments:True" in options:
            for other in ("max_split_size_mb", "garbage_collection_threshold"):
                if f"{other}:" in text:
                    return (
                        f"{name}={text}: {other} does not go with expandable_segments:True; leave "
                        "one of them out"
                    )
    return ""


# -- time limits ----------------------------------------------------------------------------------


def waits_too_long(environ: Mapping[str, str], asked: Asked) -> str:
    limit = number(environ, "HCCL_EXEC_TIMEOUT")
    wait = round(asked.wait.total_seconds())
    groups = round(group_limit(asked.wait).total_seconds())
    if limit is None or limit < groups:
        return ""
    return (
        f"HCCL_EXEC_TIMEOUT={limit} is not below the time limit of the groups, {groups} s: torch_npu "
        f"would end a rank before HCCL writes what hangs; unset it for {wait} s, or raise "
        f"training.distributed_timeout_minutes: {wait // 60}"
    )


def events_too_short(environ: Mapping[str, str], asked: Asked) -> str:
    event = number(environ, "HCCL_EVENT_TIMEOUT")
    limit = number(environ, "HCCL_EXEC_TIMEOUT")
    if limit is None:
        limit = round(asked.wait.total_seconds())
    if not event or (limit and event > limit):
        return ""
    return (
        f"HCCL_EVENT_TIMEOUT={event} must be longer than HCCL_EXEC_TIMEOUT ({limit}); unset it, "
        "and it follows that"
    )


# -- HCCL -----------------------------------------------------------------------------------------

EXPANSION_MODES = "AI_CPU AICPU_CacheDisable AIV CCU_MS CCU_SCHED HOST HOST_TS".split()


def expansion_mode(environ: Mapping[str, str], asked: Asked) -> str:
    mode = environ.get("HCCL_OP_EXPANSION_MODE")
    if mode == "AIV":
        return (
            "HCCL_OP_EXPANSION_MODE=AIV holds for all groups, and HCCL allows it for inference and "
            "for one group at a time only; unset it: the tensor-parallel groups of rollout, and "
            "they alone, ask for AIV by themselves"
        )
    if mode is not None and mode not in EXPANSION_MODES:
        return f"HCCL_OP_EXPANSION_MODE={mode} is not one of {', '.join(EXPANSION_MODES)}; unset it"
    return ""


def deterministic(environ: Mapping[str, str], asked: Asked) -> str:
    value = environ.get("HCCL_DETERMINISTIC")
    if value is None or value.lower() in ("false", "true", "strict"):
        return ""
    return f"HCCL_DETERMINISTIC={value} must be false, true or strict; unset it for false"


def no_such_interface(environ: Mapping[str, str], asked: Asked) -> str:
    """`eth` is the beginning of names, `=eth0` a name, and a ^ before either excludes it."""
    text = environ.get("HCCL_SOCKET_IFNAME")
    if text is None or "HCCL_IF_IP" in environ:
        return ""
    excludes = text.startswith("^")
    rest = text.removeprefix("^")
    exact = rest.startswith("=")
    names = rest.removeprefix("=").split(",")
    left = []
    for interface in asked.interfaces:
        if exact:
            named = interface in names
        else:
            named = interface.startswith(tuple(names))
        if named != excludes:
            left.append(interface)
    if left:
        return ""
    return (
        f"HCCL_SOCKET_IFNAME={text} leaves none of this node's network interfaces, "
        f"{', '.join(asked.interfaces)}; name one that reaches the other nodes"
    )


# -- devices and cores ----------------------------------------------------------------------------


def visible_devices(environ: Mapping[str, str], asked: Asked) -> str:
    text = environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if text is None:
        return ""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        return (
            f"ASCEND_RT_VISIBLE_DEVICES={text} must be numbers with commas and no spaces (the list "
            "ends at the first other sign), such as 0,1,2,3"
        )
    devices = [int(part) for part in text.split(",")]
    right = sorted(set(devices))
    if devices != right:
        return (
            f"ASCEND_RT_VISIBLE_DEVICES={text} must rise from number to number; write "
            f"{','.join(map(str, right))}"
        )
    return ""


AFFINITY = re.compile(
    r"(mode:)?[012]"
    r"(,(force:[01]|npu_affine:[01]|lazy_bind:[01]|bind_irq:[01]|npu\d{1,2}:\d+(-\d+)?))*"
)


def affinity(environ: Mapping[str, str], asked: Asked) -> str:
    text = environ.get("CPU_AFFINITY_CONF")
    if not text or AFFINITY.fullmatch(text):
        return ""
    return (
        f"CPU_AFFINITY_CONF={text} is not of the form 1,npu0:0-23,npu1:24-47 (0, 1 or 2, then cores "
        "of each NPU, npu_affine:1, lazy_bind:0, and from torch_npu 2.10 on force:1); unset it for "
        "1,lazy_bind:0"
    )


def too_many_threads(environ: Mapping[str, str], asked: Asked) -> str:
    threads = number(environ, "OMP_NUM_THREADS")
    if threads is None or threads <= asked.cores:
        return ""
    return (
        f"OMP_NUM_THREADS={threads} is more than the {asked.cores} cores of this node, which its "
        "ranks share; set 1, or unset it and start with launch.sh"
    )


# -- worth a look ---------------------------------------------------------------------------------


def other_name_is_not_read(environ: Mapping[str, str], asked: Asked) -> str:
    if "PYTORCH_ALLOC_CONF" not in environ or "PYTORCH_NPU_ALLOC_CONF" in environ:
        return ""
    if asked.reads_alloc_conf:
        return ""
    return (
        "PYTORCH_ALLOC_CONF is not known to be read by a torch_npu older than 2.10.0.post7, so our "
        "PYTORCH_NPU_ALLOC_CONF is set beside it; set that name, and unset this one"
    )


def waits_for_ever(environ: Mapping[str, str], asked: Asked) -> str:
    if number(environ, "HCCL_EXEC_TIMEOUT") != 0:
        return ""
    groups = round(group_limit(asked.wait).total_seconds())
    return (
        "HCCL_EXEC_TIMEOUT=0 lets HCCL wait for ever: torch_npu ends a rank that hangs after "
        f"{groups} s, and HCCL does not write what hangs; unset it"
    )


def waits_too_short(environ: Mapping[str, str], asked: Asked) -> str:
    limit = number(environ, "HCCL_EXEC_TIMEOUT")
    wait = round(asked.wait.total_seconds())
    if not limit or limit >= wait:
        return ""
    return (
        f"HCCL_EXEC_TIMEOUT={limit} ends a wait before "
        f"training.distributed_timeout_minutes: {wait // 60} ({wait} s) does; unset it for {wait} s"
    )


def rank_table(environ: Mapping[str, str], asked: Asked) -> str:
    name = environ.get("RANK_TABLE_FILE")
    if name is None:
        return ""
    return (
        f"RANK_TABLE_FILE={name} has no effect here: the world's group is gloo, and each group of "
        "HCCL names its ranks; unset it"
    )


def main_thread_on_one_core(environ: Mapping[str, str], asked: Asked) -> str:
    text = environ.get("CPU_AFFINITY_CONF", "")
    if AFFINITY.fullmatch(text) and text.removeprefix("mode:").startswith("2"):
        return (
            f"CPU_AFFINITY_CONF={text} ties the main thread to one core, and with it the reward "
            "workers that it starts; 1 keeps to the cores of the NPU"
        )
    return ""


def two_networks(environ: Mapping[str, str], asked: Asked) -> str:
    gloo = environ.get("GLOO_SOCKET_IFNAME")
    hccl = environ.get("HCCL_SOCKET_IFNAME", "").removeprefix("=")
    if gloo is None or not hccl or hccl.startswith("^") or gloo.startswith(hccl):
        return ""
    return (
        f"GLOO_SOCKET_IFNAME={gloo} and HCCL_SOCKET_IFNAME={hccl} are different; recipes name the "
        "same interface in both"
    )


# Variables that programs of CANN and torch_npu read, or that its set_env.sh sets, with names near
# those above.
ALSO_KNOWN = frozenset(
    """
    ASCEND_VISIBLE_DEVICES HCCL_ASYNC_ERROR_HANDLING HCCL_DESYNC_DEBUG HCCL_BLOCKING_WAIT
    HCCL_ALGO HCCL_DEBUG_CONFIG HCCL_DIAGNOSE_ENABLE HCCL_ENTRY_LOG_ENABLE HCCL_DFS_CONFIG
    HCCL_HOST_SOCKET_PORT_RANGE HCCL_NPU_SOCKET_PORT_RANGE HCCL_INTER_HCCS_DISABLE
    HCCL_INTRA_PCIE_ENABLE HCCL_INTRA_ROCE_ENABLE HCCL_LOGIC_SUPERPOD_ID HCCL_OP_RETRY_ENABLE
    HCCL_OP_RETRY_PARAMS HCCL_RDMA_PCIE_DIRECT_POST_NOSTRICT HCCL_RDMA_QPS_PER_CONNECTION
    HCCL_RDMA_RETRY_CNT HCCL_RDMA_SL HCCL_RDMA_TC HCCL_RDMA_TIMEOUT HCCL_SOCKET_FAMILY
    HCCL_WHITELIST_DISABLE HCCL_WHITELIST_FILE HCCL_CCU_CUSTOM_SCHED_BUFFSIZE
    """.split()
)
PREFIXES = ("HCCL_", "P2P_HCCL_", "ASCEND_", "TASK_QUEUE", "CPU_AFFINITY", "PYTORCH_NPU_")


def misspelt(environ: Mapping[str, str]) -> list[str]:
    """Names that nothing reads, near one that is read."""
    notes = []
    for name in environ:
        if name in MEANINGS or name in ALSO_KNOWN or not name.startswith(PREFIXES):
            continue
        if hint := nearest(name, MEANINGS, likeness=0.9):
            notes.append(f"{name} is set, and nothing is known to read it{hint}")
    return notes


PROBLEMS: tuple[Judge, ...] = (
    queue_for_graphs,
    queue_is_off,
    launches_block,
    overflows_are_hidden,
    two_allocators,
    allocator_options,
    waits_too_long,
    events_too_short,
    expansion_mode,
    deterministic,
    no_such_interface,
    visible_devices,
    affinity,
    too_many_threads,
)
NOTES: tuple[Judge, ...] = (
    other_name_is_not_read,
    waits_for_ever,
    waits_too_short,
    rank_table,
    main_thread_on_one_core,
    two_networks,
)
