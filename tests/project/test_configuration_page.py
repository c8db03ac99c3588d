"""docs/configuration.md: the keys that must be given are those without a default, and its settings load."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from r1zero.config.load import SECTIONS
from r1zero.preflight.checks import check
from r1zero.preflight.resolve import load_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "configuration.md").read_text()


def part(heading: str) -> str:
    return PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]


def test_the_keys_that_must_be_given_are_those_without_a_default() -> None:
    named = re.findall(r"^\| `([\w.]+)`", part("Keys that must be given"), flags=re.MULTILINE)
    without = [
        f"{section}.{entry.name}"
        for section, kind in SECTIONS.items()
        for entry in dataclasses.fields(kind)
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    ]
    assert sorted(named) == sorted(without)


def test_settings_that_a_row_proposes_are_accepted() -> None:
    rows = [re.findall(r"`([a-z]\w+\.[\w.]+): ([^`]+)`", line) for line in PAGE.split("\n")]
    rows = [row for row in rows if row]
    assert len(rows) > 8
    for row in rows:
        cfg, _ = load_config("tiny", [f"{key}={value}" for key, value in row])
        for problem in check(cfg, absent_ok=True):  # of another key, which no longer fits
            assert not any(key in problem for key, _ in row), problem
