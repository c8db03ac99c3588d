"""docs/recipes.md: every command on it is one that a run would accept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from r1zero.preflight.checks import check
from r1zero.preflight.resolve import load_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text()
LAUNCH = re.compile(r"(?:launch\.sh|main\.py --config) (\w+)([^`\n]*)")
OVERRIDES = re.compile(r"^\| [^|]+ \| `([a-z_]+(?:\.[^`=]+)?=[^`]+)`[^|]* \|", flags=re.MULTILINE)
COMMANDS = sorted(set(LAUNCH.findall(PAGE)))


@pytest.fixture(autouse=True)
def paths_from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def problems(config: str, overrides: str) -> list[str]:
    """What a start would refuse; models and data need not be here."""
    cfg, _ = load_config(config, overrides.split())
    return check(cfg, absent_ok=True)


def test_every_shipped_configuration_is_a_recipe() -> None:
    assert {config for config, _ in COMMANDS} == {
        path.stem for path in (ROOT / "configs").glob("*.yaml")
    }


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_is_accepted(command: tuple[str, str]) -> None:
    assert problems(*command) == []


@pytest.mark.parametrize("overrides", OVERRIDES.findall(PAGE))
def test_overrides_are_accepted(overrides: str) -> None:
    assert problems("tiny", overrides) == []


def test_all_overrides_were_found() -> None:
    assert len(OVERRIDES.findall(PAGE)) == 6
