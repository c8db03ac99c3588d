"""What is wrong with variables of NPUs: each judge speaks about its mistake, and only then."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from r1zero.distributed.npu_environment import defaults
from r1zero.preflight.environment import (
    ALSO_KNOWN,
    NOTES,
    PROBLEMS,
    RANGES,
    Asked,
    environment_notes,
    environment_problems,
)

ASKED = Asked(
    wait=timedelta(minutes=45),
    graphs=True,
    interfaces=["lo", "eth0", "ib1"],
    cores=192,
    reads_alloc_conf=True,
)
OLDER = replace(ASKED, reads_alloc_conf=False)  # torch_npu
# Variables, and what the sentence must say: what is wrong, and the way out.
WRONG = [
    ({"TASK_QUEUE_ENABLE": "2"}, "refuse to capture", "decode_graphs=false"),
    ({"TASK_QUEUE_ENABLE": "3"}, "must be a whole number from 0 to 2", "such as 1"),
    ({"TASK_QUEUE_ENABLE": "0"}, "waits for the host", "unset it"),
    ({"ASCEND_LAUNCH_BLOCKING": "1"}, "for debugging", "unset it"),
    ({"INF_NAN_MODE_ENABLE": "0"}, "cuts overflows", "set 1"),
    (
        {"PYTORCH_ALLOC_CONF": "", "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"},
        "are both set",
        "unset the first",
    ),
    (
        {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True, max_split_size_mb:250"},
        "max_split_size_mb does not go with expandable_segments:True",
        "leave one of them out",
    ),
    (
        {"PYTORCH_ALLOC_CONF": "pin_memory_expandable_segments:True"},
        "captures no graphs",
        "leave it out",
    ),
    ({"HCCL_EXEC_TIMEOUT": "2820"}, "is not below the time limit of the groups, 2820 s", "2700 s"),
    ({"HCCL_EXEC_TIMEOUT": "half an hour"}, "must be a whole number from 0 on", "such as 2700"),
    ({"HCCL_EVENT_TIMEOUT": "2700"}, "longer than HCCL_EXEC_TIMEOUT (2700)", "unset it"),
    ({"HCCL_CONNECT_TIMEOUT": "60"}, "from 120 to 7200", "such as 1800"),
    ({"HCCL_CONNECT_TIMEOUT": "7201"}, "from 120 to 7200", "such as 1800"),
    ({"HCCL_BUFFSIZE": "200MB"}, "must be a whole number", "such as 200"),
    ({"HCCL_IF_BASE_PORT": "65530"}, "from 1024 to 65520", "such as 60000"),
    ({"HCCL_OP_EXPANSION_MODE": "AIV"}, "for one group at a time only", "unset it"),
    ({"HCCL_OP_EXPANSION_MODE": "aiv"}, "is not one of AI_CPU", "unset it"),
    ({"HCCL_DETERMINISTIC": "1"}, "must be false, true or strict", "unset it"),
    ({"HCCL_SOCKET_IFNAME": "=eth"}, "leaves none of", "lo, eth0, ib1"),
    ({"HCCL_SOCKET_IFNAME": "bond"}, "leaves none of", "lo, eth0, ib1"),
    ({"HCCL_SOCKET_IFNAME": "^lo,eth,ib"}, "leaves none of", "lo, eth0, ib1"),
    ({"ASCEND_RT_VISIBLE_DEVICES": "0, 1"}, "no spaces", "such as 0,1,2,3"),
    ({"ASCEND_RT_VISIBLE_DEVICES": "3,1,1"}, "must rise", "write 1,3"),
    ({"CPU_AFFINITY_CONF": "on"}, "from torch_npu 2.10 on force:1", "unset it for 1,lazy_bind:0"),
    ({"CPU_AFFINITY_CONF": "1;npu0:0-23"}, "is not of the form", "unset it"),
    ({"OMP_NUM_THREADS": "193"}, "more than the 192 cores", "set 1"),
    ({"OMP_NUM_THREADS": "0"}, "must be a whole number from 1 on", "such as 1"),
]
FINE = [
    {},
    defaults(generates=True, wait=timedelta(minutes=45)),
    {"HCCL_EXEC_TIMEOUT": "2700"},
    {"HCCL_EVENT_TIMEOUT": "0"},
    {"HCCL_EVENT_TIMEOUT": "2820", "HCCL_EXEC_TIMEOUT": "2819"},
    {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
    {"HCCL_SOCKET_IFNAME": "eth"},
    {"HCCL_SOCKET_IFNAME": "=ib1,eth1"},
    {"HCCL_SOCKET_IFNAME": "^=eth0"},
    {"HCCL_SOCKET_IFNAME": "bond", "HCCL_IF_IP": "10.0.0.1"},
    {"ASCEND_RT_VISIBLE_DEVICES": "0,2,10"},
    {"CPU_AFFINITY_CONF": "mode:1,force:1,npu0:0-23,npu10:24"},
    {"CPU_AFFINITY_CONF": ""},
    {"HCCL_OP_EXPANSION_MODE": "HOST"},
    {"HCCL_DETERMINISTIC": "TRUE"},
    {"PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:250"},
    {"OMP_NUM_THREADS": "192"},
]


@pytest.mark.parametrize(("environ", "what", "way_out"), WRONG)
def test_a_mistake_is_one_sentence_with_a_way_out(
    environ: dict[str, str], what: str, way_out: str
) -> None:
    [problem] = environment_problems(environ, ASKED)
    assert what in problem and way_out in problem
    assert problem.startswith(tuple(environ)), "the variable comes first"


@pytest.mark.parametrize("environ", FINE)
def test_what_is_allowed_is_not_told(environ: dict[str, str]) -> None:
    assert environment_problems(environ, ASKED) == []
    assert environment_notes(environ, ASKED) == []


def test_without_graphs_the_faster_queue_is_right() -> None:
    plain = Asked(graphs=False)
    assert environment_problems({"TASK_QUEUE_ENABLE": "2"}, plain) == []
    pinned = {"PYTORCH_NPU_ALLOC_CONF": "pin_memory_expandable_segments:True"}
    assert environment_problems(pinned, plain) == []


def test_an_event_must_not_end_before_a_wait_for_ever() -> None:
    environ = {"HCCL_EVENT_TIMEOUT": "9000", "HCCL_EXEC_TIMEOUT": "0"}
    [problem] = environment_problems(environ, ASKED)
    assert "longer than HCCL_EXEC_TIMEOUT (0)" in problem


def test_an_older_torch_npu_reads_one_name_of_the_allocators_options() -> None:
    environ = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert environment_problems(environ, OLDER) == []
    [note] = environment_notes(environ, OLDER)
    assert "our PYTORCH_NPU_ALLOC_CONF is set beside it; set that name, and unset this one" in note
    assert environment_notes({"PYTORCH_NPU_ALLOC_CONF": "", **environ}, OLDER) == []


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"HCCL_EXEC_TIMEOUT": "0"}, "torch_npu ends a rank that hangs after 2820 s"),
        ({"HCCL_EXEC_TIMEOUT": "1800"}, "ends a wait before training.distributed_timeout_minutes"),
        ({"RANK_TABLE_FILE": "/nowhere/ranks.json"}, "has no effect here"),
        ({"CPU_AFFINITY_CONF": "2,npu0:0-3"}, "ties the main thread to one core"),
        (
            {"GLOO_SOCKET_IFNAME": "eth0", "HCCL_SOCKET_IFNAME": "ib1"},
            "recipes name the same interface",
        ),
        ({"HCCL_CONECT_TIMEOUT": "1800"}, "did you mean HCCL_CONNECT_TIMEOUT?"),
        ({"ASCEND_RT_VISIBLE_DEVICE": "0"}, "did you mean ASCEND_RT_VISIBLE_DEVICES?"),
        ({"TASK_QUEUE_ENABLED": "1"}, "did you mean TASK_QUEUE_ENABLE?"),
    ],
)
def test_what_may_be_meant_is_a_note(environ: dict[str, str], said: str) -> None:
    assert environment_problems(environ, ASKED) == []
    [note] = environment_notes(environ, ASKED)
    assert said in note


def test_names_that_others_read_are_not_called_misspelt() -> None:
    set_by_cann = ("ASCEND_HOME_PATH", "ASCEND_OPP_PATH", "ASCEND_TOOLKIT_HOME")
    environ = dict.fromkeys([*ALSO_KNOWN, *set_by_cann, "ASCEND_GLOBAL_LOG_LEVEL"], "1")
    assert environment_notes(environ, ASKED) == []


def test_every_judge_is_made_to_speak() -> None:
    silent = set(PROBLEMS) | set(NOTES)
    notes = [
        {"CPU_AFFINITY_CONF": "2"},
        {"GLOO_SOCKET_IFNAME": "a", "HCCL_SOCKET_IFNAME": "b"},
        {"HCCL_EXEC_TIMEOUT": "0"},
        {"HCCL_EXEC_TIMEOUT": "1800"},
        {"PYTORCH_ALLOC_CONF": ""},
        {"RANK_TABLE_FILE": "ranks.json"},
    ]
    for environ in [environ for environ, *_ in WRONG] + notes:
        silent -= {judge for judge in silent if judge(environ, OLDER)}
    assert not silent
    judged = {name for environ, *_ in WRONG for name in environ}
    assert RANGES.keys() - judged == {"P2P_HCCL_BUFFSIZE"}
