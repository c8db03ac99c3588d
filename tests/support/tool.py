"""Tools of tools/, run in this process, which has the heavy imports."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def functions(name: str) -> dict[str, Any]:
    """Return what a tool defines; the import path stays as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(TOOLS), *sys.path])  # as of a script there
        return runpy.run_path(str(TOOLS / name))


def run_here(name: str, *arguments: str) -> int:
    """Run a tool; returns its exit code, also when argparse leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        try:
            return functions(name)["main"]()
        except SystemExit as left:
            return left.code
