"""The pages for those who join: files and functions that they name are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "r1zero"
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"]
# `file.py` `Name.method`
PLACE = re.compile(r"`([\w/]+\.py)` `([\w.]+)`")
FILE = re.compile(r"`([\w./]+(?:\.(?:py|md|sh|toml|ini|jsonl|js)|/))`")


def defined(path: Path) -> set[str]:
    """The functions, classes and methods of a file, as names with dots."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            inner = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            names |= {f"{node.name}.{part.name}" for part in inner}
    return names


def test_functions_along_the_flow_of_a_sample_are_where_the_page_says() -> None:
    places = PLACE.findall((ROOT / "docs" / "architecture.md").read_text())
    assert len(places) > 15
    missing = [(file, name) for file, name in places if name not in defined(PACKAGE / file)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = {name for name in FILE.findall(page.read_text()) if name != "metrics.jsonl"}
    assert len(named) > 5
    missing = [name for name in named if not any((at / name).exists() for at in (ROOT, PACKAGE))]
    assert not missing


def test_the_floors_are_those_of_the_import_graph() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn = text.split("From the top:")[1].split("Four rules")[0]
    shown = [set(re.findall(r"\w+", floor)) for floor in drawn.split(">")]
    tree = ast.parse((ROOT / "tests" / "project" / "test_import_graph.py").read_text())
    values = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    floors = ast.literal_eval(values["FLOORS"])
    assert shown == [set(floor) for floor in reversed(floors)]


def test_every_folder_of_the_package_stands_in_the_tree() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = text.split("## The tree")[1].split("## The floors")[0]
    shown = set(re.findall(r"^      ([\w.]+/?)  ", tree, flags=re.MULTILINE))
    found = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    found |= {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert shown == found
