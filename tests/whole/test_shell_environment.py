"""tools/environment.sh: what launch.sh and slurm.sbatch set before Python starts; a user's value
wins."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.launch_sh import launch
from support.patience import LONG

ROOT = Path(__file__).resolve().parents[2]
SET_FOR_ALL = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def show(tmp_path: Path) -> Path:
    """In the place of Python: prints its environment."""
    return program(tmp_path / "show", "env")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A shared library with the name of jemalloc; the loader warns of it, and goes on."""
    path = tmp_path / "libjemalloc.so.2"
    path.touch()
    return path


@pytest.fixture
def npu_machine(tmp_path: Path, library: Path) -> str:
    """PATH of a machine with NPUs, whose loader knows jemalloc."""
    program(tmp_path / "bin" / "npu-smi", "")
    listed = f"printf '\\tlibjemalloc.so.2 (libc6,x86-64) => %s\\n' {library}"
    program(tmp_path / "bin" / "ldconfig", listed)
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


def launched(show: Path, **variables: str) -> dict[str, str]:
    """The environment that launch.sh hands on, without those of the tests."""
    unset = dict.fromkeys([*SET_FOR_ALL, "LD_PRELOAD", "R1ZERO_JEMALLOC"], "")
    code, printed, errors = launch("--dry-run", R1ZERO_PYTHON=str(show), **(unset | variables))
    assert code == 0, errors
    return dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)


def test_a_users_value_wins(show: Path) -> None:
    assert launched(show).items() >= SET_FOR_ALL.items()
    mine = dict.fromkeys(SET_FOR_ALL, "7")
    assert launched(show, **mine).items() >= mine.items()


def test_jemalloc_is_preloaded_on_npu_machines_if_it_is_there(
    show: Path, npu_machine: str, library: Path, tmp_path: Path
) -> None:
    assert launched(show, PATH=npu_machine)["LD_PRELOAD"] == str(library)
    with_other = launched(show, PATH=npu_machine, LD_PRELOAD=str(tmp_path / "other.so"))
    assert with_other["LD_PRELOAD"] == f"{library}:{tmp_path / 'other.so'}"
    program(tmp_path / "bin" / "ldconfig", "exit 1")
    assert launched(show, PATH=npu_machine)["LD_PRELOAD"] == ""


def test_jemalloc_is_left_out_where_it_is_not_wanted(
    show: Path, npu_machine: str, tmp_path: Path
) -> None:
    assert launched(show)["LD_PRELOAD"] == "", "no NPU here"
    assert launched(show, PATH=npu_machine, R1ZERO_JEMALLOC="0")["LD_PRELOAD"] == ""
    tcmalloc = str(tmp_path / "libtcmalloc_minimal.so.4")
    assert launched(show, PATH=npu_machine, LD_PRELOAD=tcmalloc)["LD_PRELOAD"] == tcmalloc


def test_jemalloc_may_be_named_and_must_be_there(show: Path, library: Path) -> None:
    assert launched(show, R1ZERO_JEMALLOC=str(library))["LD_PRELOAD"] == str(library)
    code, _, errors = launch("--dry-run", R1ZERO_PYTHON=str(show), R1ZERO_JEMALLOC="/no/jemalloc")
    assert code == 2
    assert errors == (
        "R1ZERO_JEMALLOC=/no/jemalloc is not there; name the file libjemalloc.so.2, or set 0 to do "
        "without\n"
    )


def test_tasks_of_slurm_get_the_same(tmp_path: Path, npu_machine: str, library: Path) -> None:
    """srun hands the environment of the batch script on."""
    program(tmp_path / "bin" / "srun", "env")
    variables = {"SLURM_JOB_ID": "1", "R1ZERO_ROOT": str(ROOT), "PATH": npu_machine}
    mine = {"OMP_NUM_THREADS": "4", "LD_PRELOAD": "", "R1ZERO_JEMALLOC": ""}
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "slurm.sbatch"), "tiny"],
        env=os.environ | variables | mine,
        text=True,
        capture_output=True,
        timeout=LONG,
    )
    assert done.returncode == 0, done.stderr
    seen = set(done.stdout.splitlines())
    assert {"OMP_NUM_THREADS=4", f"LD_PRELOAD={library}", "CUDA_DEVICE_MAX_CONNECTIONS=1"} <= seen
