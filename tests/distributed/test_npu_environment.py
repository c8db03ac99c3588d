"""Our defaults of the variables of NPUs: set where the user has not, and only what is explained."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from support.patience import LONG

from r1zero.distributed import groups, npu_environment
from r1zero.distributed.device import Device
from r1zero.distributed.group_list import DEVICE, HOST, PlannedGroup, groups_of
from r1zero.distributed.groups import World
from r1zero.distributed.npu_environment import (
    MEANINGS,
    defaults,
    environment_table,
    group_config,
    group_limit,
    reads_alloc_conf,
    set_defaults,
    tensor_megabytes,
)
from r1zero.distributed.placement import RoleSize, place

ROOT = Path(__file__).resolve().parents[2]
WAIT = timedelta(minutes=45)


@pytest.fixture
def installed_torch_npu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the metadata of torch_npu say a version; "" for not installed."""

    def install(release: str) -> None:
        def version(name: str) -> str:
            assert name == "torch_npu"
            if not release:
                raise PackageNotFoundError(name)
            return release

        # A cache of its own, so that later tests ask again.
        fresh = functools.cache(reads_alloc_conf.__wrapped__)
        monkeypatch.setattr(npu_environment, "version", version)
        monkeypatch.setattr(npu_environment, "reads_alloc_conf", fresh)

    return install


def test_a_users_value_wins_and_the_others_are_set() -> None:
    environ = {"TASK_QUEUE_ENABLE": "0", "HCCL_CONNECT_TIMEOUT": ""}
    set_defaults(environ, generates=True, wait=WAIT)
    assert environ["TASK_QUEUE_ENABLE"] == "0"
    assert environ["HCCL_CONNECT_TIMEOUT"] == "", "set to nothing is the user's, too"
    assert environ["CPU_AFFINITY_CONF"] == "1,lazy_bind:0", "bound when the device is opened"
    assert environ.keys() == defaults(True, WAIT).keys()


def test_no_graph_is_captured_with_the_queue_of_level_2() -> None:
    assert defaults(generates=True, wait=WAIT)["TASK_QUEUE_ENABLE"] == "1"
    assert defaults(generates=False, wait=WAIT)["TASK_QUEUE_ENABLE"] == "2"


def test_hccl_gives_up_before_torch_npu_ends_the_process() -> None:
    for minutes in (1, 45, 600):
        wait = timedelta(minutes=minutes)
        limit = int(defaults(True, wait)["HCCL_EXEC_TIMEOUT"])
        assert limit == 60 * minutes
        assert group_limit(wait).total_seconds() >= limit + 60, "HCCL needs time to write"


def test_groups_on_devices_wait_longer_than_those_on_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[str, timedelta] = {}

    def new_group(
        ranks: tuple[int, ...], backend: str, timeout: timedelta, options: object
    ) -> None:
        limits[backend] = timeout

    monkeypatch.setattr(groups, "_new_group", new_group)
    monkeypatch.setattr(Device, "group_options", lambda self, megabytes, decodes: None)
    world = object.__new__(World)
    world.device = Device("npu", torch.device("cpu"), "hccl")
    world.timeout = WAIT
    world._groups = {}
    for plane in (HOST, DEVICE):
        world._group(PlannedGroup((), (0, 1), plane, 0, warm=False, decodes=False))
    assert limits == {"gloo": WAIT, "hccl": WAIT + timedelta(minutes=2)}


@pytest.mark.parametrize("release", ["2.10.0.post7", "2.10.1"])
def test_the_other_name_of_the_allocators_options_stands_alone_where_it_is_read(
    release: str, installed_torch_npu: Callable[[str], None]
) -> None:
    """torch_npu ends the process when both are set."""
    installed_torch_npu(release)
    environ = {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}
    set_defaults(environ, generates=False, wait=WAIT)
    assert "PYTORCH_NPU_ALLOC_CONF" not in environ
    assert "PYTORCH_NPU_ALLOC_CONF" not in {row.name for row in environment_table(environ, WAIT)}


@pytest.mark.parametrize("release", ["2.7.1.post4", "2.10.0.post4", ""])
def test_ours_is_set_where_the_other_name_is_not_known_to_be_read(
    release: str, installed_torch_npu: Callable[[str], None]
) -> None:
    installed_torch_npu(release)
    environ = {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}
    set_defaults(environ, generates=False, wait=WAIT)
    assert environ["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"


def test_the_table_says_whose_a_value_is() -> None:
    rows = {row.name: row for row in environment_table({"HCCL_BUFFSIZE": "256"}, WAIT)}
    assert (rows["HCCL_BUFFSIZE"].value, rows["HCCL_BUFFSIZE"].is_users) == ("256", True)
    assert (rows["HCCL_EXEC_TIMEOUT"].value, rows["HCCL_EXEC_TIMEOUT"].is_users) == ("2700", False)
    assert rows["TASK_QUEUE_ENABLE"].value == "1 on ranks that generate, 2 on others"
    assert rows["HCCL_OP_EXPANSION_MODE"].value.startswith(
        "AIV for tensor-parallel groups of rollout"
    )
    assert "HCCL_IF_IP" not in rows, "neither the user nor we have set it"


def test_a_users_buffer_size_reaches_the_groups() -> None:
    """Options of a group win over variables."""
    assert tensor_megabytes({}) == 200
    assert tensor_megabytes({"HCCL_BUFFSIZE": "256"}) == 256


def test_a_group_that_decodes_asks_for_the_vector_cores() -> None:
    assert group_config({}, 200, decodes=True) == {
        "hccl_buffer_size": 200,
        "hccl_op_expansion_mode": 3,
    }
    assert group_config({}, 0, decodes=False) == {"hccl_buffer_size": 1}
    users = {"HCCL_OP_EXPANSION_MODE": "HOST"}
    assert group_config(users, 200, decodes=True) == {"hccl_buffer_size": 200}


@pytest.mark.parametrize(
    ("tp", "ep", "decoding"),
    [(2, 1, [[2, 3], [4, 5]]), (1, 1, []), (2, 4, [[2, 3], [4, 5]]), (1, 4, [])],
)
def test_only_tensor_parallel_groups_of_rollout_decode(
    tp: int, ep: int, decoding: list[list[int]]
) -> None:
    """Train ranks have groups beside each other, which HCCL forbids for AIV; so have publications,
    whose members must agree on it."""
    sizes = {"train": RoleSize(2, 2), "rollout": RoleSize(4, tp, ep=ep), "ref": RoleSize(2, 2)}
    placed = place(sizes, colocate=False)
    found = {
        group.ranks
        for rank in range(placed.world_size)
        for group in groups_of(placed, rank, 200)
        if group.decodes
    }
    assert sorted(map(list, found)) == decoding


def test_each_variable_is_explained() -> None:
    assert defaults(True, WAIT).keys() <= MEANINGS.keys()
    page = (ROOT / "docs" / "environment.md").read_text()
    rows = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert MEANINGS.keys() <= set(re.findall(r"`(\w+)`", rows))


PROGRAM = """
import os, sys
sys.path[:0] = {paths!r}
from datetime import timedelta
from r1zero.distributed.launch import ALONE
from r1zero.distributed.placement import RoleSize, place
from r1zero.distributed.process import run_rank
placement = place(dict(train=RoleSize(1), rollout=RoleSize(1)), colocate=True)
before = set(os.environ)
try:
    run_rank(ALONE, placement, timedelta(minutes=45), False, False, lambda world: None,
             lambda nothing: None)
except ModuleNotFoundError as error:
    assert error.name.startswith("mindspeed"), error
print("new:", *sorted(set(os.environ) - before))
"""
TORCH_NPU = "class npu:\n    is_available = staticmethod(lambda: True)\n"


@pytest.mark.parametrize("has_npu", [False, True])
def test_they_are_set_before_the_device_is_opened_and_on_npus_only(
    tmp_path: Path, has_npu: bool
) -> None:
    """MindSpeed is imported before the device is opened, and is missing here."""
    if has_npu:
        (tmp_path / "torch_npu.py").write_text(TORCH_NPU)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(paths=[str(ROOT), str(tmp_path)])],
        env={name: value for name, value in os.environ.items() if name not in MEANINGS},
        text=True,
        capture_output=True,
        timeout=LONG,
    )
    assert done.returncode == 0, done.stderr
    [new] = re.findall(r"^new:.*", done.stdout, re.MULTILINE)
    if has_npu:
        assert MEANINGS.keys() & set(new.split()) == defaults(True, WAIT).keys()
    else:
        assert not MEANINGS.keys() & set(new.split())
