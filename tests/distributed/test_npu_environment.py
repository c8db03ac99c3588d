"""Our defaults of the variables of NPUs: set where the user has not, and only what is explained."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from support.patience import LONG

from r1zero.distributed.npu_environment import (
    MEANINGS,
    buffer_megabytes,
    defaults,
    environment_table,
    set_defaults,
)

ROOT = Path(__file__).resolve().parents[2]
WAIT = timedelta(minutes=45)


def test_a_users_value_wins_and_the_others_are_set() -> None:
    environ = {"TASK_QUEUE_ENABLE": "0", "HCCL_CONNECT_TIMEOUT": ""}
    set_defaults(environ, generates=True, wait=WAIT)
    assert environ["TASK_QUEUE_ENABLE"] == "0"
    assert environ["HCCL_CONNECT_TIMEOUT"] == "", "set to nothing is the user's, too"
    assert environ["CPU_AFFINITY_CONF"] == "1"
    assert environ.keys() == defaults(True, WAIT).keys()


def test_no_graph_is_captured_with_the_queue_of_level_2() -> None:
    assert defaults(generates=True, wait=WAIT)["TASK_QUEUE_ENABLE"] == "1"
    assert defaults(generates=False, wait=WAIT)["TASK_QUEUE_ENABLE"] == "2"


def test_hccl_waits_longer_than_the_time_limit_of_the_groups() -> None:
    for minutes in (1, 45, 600):
        wait = timedelta(minutes=minutes)
        assert int(defaults(True, wait)["HCCL_EXEC_TIMEOUT"]) == 60 * minutes + 60


def test_the_newer_name_of_the_allocators_options_stands_alone() -> None:
    """torch_npu ends the process when both are set."""
    environ = {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}
    set_defaults(environ, generates=False, wait=WAIT)
    assert "PYTORCH_NPU_ALLOC_CONF" not in environ
    assert "PYTORCH_NPU_ALLOC_CONF" not in {row.name for row in environment_table(environ, WAIT)}


def test_the_table_says_whose_a_value_is() -> None:
    rows = {row.name: row for row in environment_table({"HCCL_BUFFSIZE": "256"}, WAIT)}
    assert (rows["HCCL_BUFFSIZE"].value, rows["HCCL_BUFFSIZE"].is_users) == ("256", True)
    assert (rows["HCCL_EXEC_TIMEOUT"].value, rows["HCCL_EXEC_TIMEOUT"].is_users) == ("2760", False)
    assert rows["TASK_QUEUE_ENABLE"].value == "1 on ranks that generate, 2 on others"
    assert "HCCL_IF_IP" not in rows, "neither the user nor we have set it"


def test_a_users_buffer_size_reaches_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    assert buffer_megabytes() == 200
    monkeypatch.setenv("HCCL_BUFFSIZE", "256")
    assert buffer_megabytes() == 256


def test_each_default_is_explained() -> None:
    assert defaults(True, WAIT).keys() <= MEANINGS.keys()


PROGRAM = """
import os, sys
sys.path.insert(0, {root!r})
from datetime import timedelta
from r1zero.distributed import device
from r1zero.distributed.launch import ALONE
from r1zero.distributed.placement import RoleSize, place
from r1zero.distributed.process import run_rank
sizes = dict.fromkeys(("train", "rollout", "ref"), RoleSize(1))
before = set(os.environ)
run_rank(ALONE, place(sizes, colocate=True), timedelta(minutes=45), False, False,
         lambda world: None, lambda nothing: print("new:", *sorted(set(os.environ) - before)))
"""


def test_on_cpus_none_is_set() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(root=str(ROOT))],
        env={name: value for name, value in os.environ.items() if name not in MEANINGS},
        text=True,
        capture_output=True,
        timeout=LONG,
    )
    assert done.returncode == 0, done.stderr
    [new] = re.findall(r"^new:.*", done.stdout, re.MULTILINE)
    assert not MEANINGS.keys() & set(new.split())
