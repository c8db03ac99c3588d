"""docs/migration.md: the old YAML on it loads, has no effect where it says so, and is refused where it says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from r1zero.config import legacy, schema
from r1zero.config.load import read_config
from r1zero.config.validate import field_names
from r1zero.errors import BadInput
from r1zero.preflight.checks import check
from r1zero.preflight.resolve import load_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "migration.md").read_text()


@pytest.fixture(scope="module")
def old_yaml() -> str:
    """The code block that begins with `defaults:`."""
    start = PAGE.index("    defaults:")
    lines = []
    for line in PAGE[start:].split("\n"):
        if line and not line.startswith("    "):
            break
        lines.append(line.removeprefix("    "))
    return "\n".join(lines)


@pytest.fixture
def old_config(old_yaml: str, tmp_path: Path) -> str:
    path = tmp_path / "grpo_trainer_qwen25_7b.yaml"
    path.write_text(old_yaml)
    return str(path)


def test_the_old_yaml_loads_and_passes_the_checks(old_config: str) -> None:
    cfg, _ = load_config(old_config)
    assert check(cfg, absent_ok=True) == []
    assert (cfg.world_size, cfg.updates_per_step) == (16, 8)


def test_keys_without_effect_are_those_that_the_page_names(old_config: str, old_yaml: str) -> None:
    named = set(re.findall(r"([\w-]+): .*# no effect", old_yaml))
    _, warnings = read_config(old_config)
    told = set()
    for warning in warnings:
        keys, _, _ = warning.partition(": accepted, no effect")
        told |= {key.split(".")[-1] for key in keys.split(", ")}
    assert told == {name.replace("-", "_") for name in named}


@pytest.mark.parametrize(
    "override",
    [
        "reward.verifier=false",
        "resource_pool.reward=[2]",
        "algorithm.adv_estimator=gae",
        "training.stage=ray_ppo",
        "algorithm.kl_penalty=full",
    ],
)
def test_what_the_page_calls_refused_is_refused(old_config: str, override: str) -> None:
    assert override.split("=")[0] in problems(old_config, override)


def test_the_table_of_keys_of_experts_is_what_the_program_does() -> None:
    start = PAGE.index("| keys of experts")
    rows = PAGE[start:].split("\n\n")[0].splitlines()[2:]
    read, ineffective, fixed, refused = (re.findall("`([^`]+)`", row) for row in rows)
    assert set(read) <= field_names(schema.Network)
    assert set(ineffective) <= set(legacy.NO_EFFECT)
    for text in fixed:
        [(key, value)] = yaml.safe_load(text).items()
        assert value in legacy.FIXED[key][0]
    [(key, value)] = yaml.safe_load(refused[0]).items()
    assert value not in legacy.FIXED[key][0] and refused[1] in legacy.FIXED[key][1]


def problems(config: str, override: str) -> str:
    """What is wrong with a configuration, a sentence a line; empty if nothing is."""
    try:
        cfg, _ = load_config(config, [override])
    except BadInput as error:
        return str(error)
    return "\n".join(check(cfg, absent_ok=True))
