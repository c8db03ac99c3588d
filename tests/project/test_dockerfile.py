"""docker/Dockerfile.ascend, as far as it can be held without an engine that builds it."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from r1zero.preflight.versions import TESTED, check_versions

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docker" / "Dockerfile.ascend"
PAGE = (ROOT / "docs" / "ascend.md").read_text()
IGNORED = (ROOT / ".dockerignore").read_text().split("\n")


def instructions() -> list[tuple[str, str]]:
    """Name and words of each instruction, lines that go on joined."""
    text = re.sub(r"^\s*#.*\n", "", FILE.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).strip().split("\n")
    found = []
    for line in lines:
        if line:
            name, words = line.split(" ", 1)
            found.append((name, words))
    return found


def all_of(wanted: str) -> list[str]:
    return [words for name, words in instructions() if name == wanted]


def arguments() -> dict[str, str]:
    """The build arguments with their defaults."""
    pairs = [words.split("=", 1) for words in all_of("ARG")]
    return {name: value.strip('"') for name, value in pairs}


def copied() -> list[str]:
    """What the image takes from the repository."""
    sources: list[str] = []
    for words in all_of("COPY"):
        sources += shlex.split(words)[:-1]
    return sources


def installed() -> dict[str, str]:
    """Every package that pip is asked for by version, arguments filled in."""
    given = arguments()
    found = {}
    for command in all_of("RUN"):
        for name, argument in re.findall(r"([\w-]+)==\$\{(\w+)\}", command):
            found[name] = given[argument]
    return found


def test_versions_are_inside_the_table() -> None:
    versions = installed() | {
        "CANN": arguments()["CANN"],
        "megatron-core": TESTED["npu"]["megatron-core"][2:],
        "transformers": "5.23.0",
        "mindspeed": "0.16.0",
    }
    assert check_versions("npu", versions) == []


def test_the_pair_is_one_that_the_page_recommends() -> None:
    given = arguments()
    assert f"| **{given['TORCH']}** | **{given['TORCH_NPU']}** | **{given['CANN']}** |" in PAGE


def test_the_commit_of_mindspeed_and_triton_are_those_of_the_page() -> None:
    assert f"| {arguments()['MINDSPEED'][:8]}," in PAGE
    assert f"triton-ascend=={arguments()['TRITON_ASCEND']}" in PAGE


def test_the_rest_comes_from_the_extra_of_setup_cfg() -> None:
    assert any('-e ".[npu]"' in command for command in all_of("RUN"))
    pinned = {Requirement(f"{name}=={version}").name for name, version in installed().items()}
    assert pinned == {"torch", "torch-npu", "triton-ascend"}


def test_the_base_image_is_named_by_version_chip_and_python() -> None:
    assert all_of("FROM") == ["quay.io/ascend/cann:${CANN}-${CHIP}-ubuntu22.04-py3.11"]
    assert arguments()["CHIP"] == "910b" and "CHIP=a3" in PAGE


@pytest.mark.parametrize("name", copied())
def test_what_is_copied_exists_and_is_sent_to_the_builder(name: str) -> None:
    assert (ROOT / name).exists() and f"!{name}" in IGNORED


def test_nothing_else_is_sent_to_the_builder() -> None:
    patterns = [line for line in IGNORED if line and not line.startswith("#")]
    assert patterns[0] == "*"
    assert {line[1:] for line in patterns if line.startswith("!")} == set(copied())


def test_what_launch_sh_runs_is_copied() -> None:
    named = re.findall(r"(?:\$root|\"\))/(\w+)/", (ROOT / "launch.sh").read_text())
    assert {"r1zero", "tools"} <= set(named) <= set(copied())


def test_arguments_are_declared_and_used() -> None:
    text = FILE.read_text()
    used = set(re.findall(r"\$\{(\w+)\}", text))
    assert used | {"PIP_EXTRA_INDEX_URL"} == set(arguments())


@pytest.mark.parametrize("command", all_of("RUN"), ids=lambda command: command[:20])
def test_commands_are_bash_and_leave_nothing_behind(command: str) -> None:
    parsed = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
    if "apt-get install" in command:
        assert "--no-install-recommends" in command and "rm -rf /var/lib/apt/lists/*" in command
    if "pip install" in command:
        assert "--no-cache-dir" in command


def test_instructions_are_those_that_every_builder_knows() -> None:
    names = {name for name, _ in instructions()}
    assert names == {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}


def test_the_command_of_the_page_mounts_into_the_folder_of_the_image() -> None:
    [folder] = all_of("WORKDIR")
    [block] = re.findall(r"    docker run (?:.*\\\n)+.*", PAGE)
    mounted = re.findall(r'-v "\$PWD/(\w+):([^"]+)"', block)
    assert mounted == [(name, f"{folder}/{name}") for name in ("models", "data", "runs")]
    devices = set(re.findall(r"--device=(\S+)", block))
    assert devices == {
        "/dev/davinci{0..7}",
        "/dev/davinci_manager",
        "/dev/devmm_svm",
        "/dev/hisi_hdc",
    }
