"""docs/ascend.md: its versions are those of the table, its gigabytes those of the dry run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from r1zero.preflight.found import look
from r1zero.preflight.memory import memory
from r1zero.preflight.resolve import load_config
from r1zero.preflight.versions import TESTED, check_versions

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "ascend.md").read_text()
CONFIGS = [
    "tiny",
    "qwen25_7b",
    "qwen25_7b_one_node",
    "qwen25_7b_a3",
    "qwen25_7b_32k",
    "qwen3_30b_a3b",
    "qwen3_30b_a3b_32k",
    "qwen3_235b_a22b",
]


def rows(head: str) -> list[list[str]]:
    """The rows of the table whose head starts so, without marks for bold and code."""
    lines = TEXT.split(f"| {head} |", 1)[1].split("\n")[2:]
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append([cell.strip().strip("*`") for cell in line.strip("|").split("|")])
    return table


def test_every_part_of_the_table_is_on_the_page() -> None:
    shown = {row[0].replace("_", "-") for row in rows("part")}
    assert set(TESTED["npu"]) - {"mindspeed"} <= shown and "MindSpeed" in shown


def test_the_ends_of_transformers_are_inside_the_range_and_their_neighbours_are_not() -> None:
    lowest, highest = [row[0].split(",")[0] for row in rows("version")]
    allowed = SpecifierSet(TESTED["npu"]["transformers"])
    assert lowest in allowed and highest in allowed
    assert "4.55.4" not in allowed and "5.24.0" not in allowed


@pytest.mark.parametrize("pair", rows("torch | torch_npu"), ids=lambda pair: pair[1])
def test_the_doctor_lets_every_pair_pass(pair: list[str]) -> None:
    torch, torch_npu, cann, _ = pair
    found = {
        "torch": torch,
        "torch-npu": torch_npu,
        "CANN": cann,
        "megatron-core": "0.16.1",
        "transformers": "4.57.6",
        "mindspeed": "0.16.0",
    }
    assert check_versions("npu", found) == []


@pytest.mark.parametrize("config", CONFIGS)
def test_gigabytes_are_those_of_the_dry_run(config: str) -> None:
    [row] = [row for row in rows("config") if row[0].split()[0] == config]
    cfg, _ = load_config(config, row[0].split()[1:])
    found = look(cfg)
    assert found.placement and found.actor.shape and found.reference.shape
    needed = memory(cfg, found.placement, found.actor.shape, found.reference.shape)
    shown = [float(figure) for figure in re.findall(r"[\d.]+", row[2])]
    assert int(row[1]) == cfg.world_size
    assert shown == [round(needed[role].total / 1e9, 1) for role in ("train", "rollout", "ref")]
