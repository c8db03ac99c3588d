"""tools/setup_env.sh: what pip is asked to install, and what it must leave alone on an NPU machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[2] / "tools" / "setup_env.sh"
# Stands for the interpreter of .venv: `pip freeze` tells an image's packages, `pip install` writes down what it got.
PYTHON = """#!/usr/bin/env bash
if [[ $* == *"pip freeze"* ]]; then
  printf '%s\\n' numpy==1.26.0 torch==2.7.1+cpu torch_npu==2.7.1.post4 torchvision==0.22.1
else
  echo "$*" >>"$(dirname "$0")/asked"
  cat "${@: -1}" >>"$(dirname "$0")/kept"
fi
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what `install` reads, and the stand-in for Python."""
    (tmp_path / ".venv").mkdir()
    (tmp_path / "setup.cfg").write_text("[metadata]\n")
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def install(checkout: Path, extra: str) -> list[str]:
    """Run `install EXTRA` there; the constraints that pip was given."""
    script = f"source {SETUP}; root={checkout}; python={checkout}/python; install {extra}"
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (checkout / "kept").read_text().splitlines()


def test_torch_and_torch_npu_of_an_npu_machine_are_kept(checkout: Path) -> None:
    assert install(checkout, "npu") == ["torch==2.7.1+cpu", "torch_npu==2.7.1.post4"]
    assert f"-e {checkout}[npu]" in (checkout / "asked").read_text()


def test_on_a_cpu_pip_is_free(checkout: Path) -> None:
    assert install(checkout, "cpu") == []


def test_the_same_setup_cfg_is_installed_once(checkout: Path) -> None:
    install(checkout, "npu")
    install(checkout, "npu")
    assert len((checkout / "asked").read_text().splitlines()) == 1
    (checkout / "setup.cfg").write_text("[metadata]\nname = other\n")
    install(checkout, "npu")
    assert len((checkout / "asked").read_text().splitlines()) == 2
