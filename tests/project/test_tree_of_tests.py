"""The tests mirror the package: a room's tests lie in the folder of its name."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = TESTS.parent / "r1zero"
# Not of one room: tools/, runs of the whole program, the repository itself, helpers, a stand-in.
OTHERS = {"tools", "whole", "project", "support", "npu_standin"}


def test_every_folder_of_tests_is_one_of_the_package() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    folders = {path.parent for path in TESTS.rglob("*.py")}
    named = {path.relative_to(TESTS).parts[0] for path in folders if path != TESTS}
    assert named <= rooms | OTHERS
    assert {path.name for path in TESTS.glob("*.py")} == {"conftest.py"}


def test_no_two_files_of_tests_have_one_name() -> None:
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert len(names) == len(set(names)), "pytest imports them by their names"


def test_no_test_imports_a_test() -> None:
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            assert not any(name.split(".")[-1].startswith("test_") for name in names), path


def test_no_test_has_a_time_limit_of_its_own() -> None:
    """A limit that fits today's machine fails on a busy one: support/patience.py has the one."""
    limits = {"timeout", "timeout_seconds"}
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg in limits:
                assert not isinstance(node.value, ast.Constant), f"{path}, line {node.lineno}"
