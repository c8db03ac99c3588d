"""launch.sh: what is wrong with its arguments or variables is one sentence, before anything is set
up."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.launch_sh import launch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"NNODES": "0"}, "NNODES=0 must be a number from 1 on"),
        ({"NNODES": "two"}, "NNODES=two must be a number from 1 on"),
        ({"NPROC_PER_NODE": "08"}, "NPROC_PER_NODE=08 must be a number from 1 on"),
        (
            {"NNODES": "2"},
            "NNODES=2 needs MASTER_ADDR (the first node's address) and NODE_RANK (0 to 1)",
        ),
        ({"NNODES": "2", "MASTER_ADDR": "here", "NODE_RANK": "2"}, "and NODE_RANK (0 to 1)"),
        ({"NNODES": "2", "MASTER_ADDR": "here", "NODE_RANK": "x"}, "and NODE_RANK (0 to 1)"),
        (
            {"NNODES": "3", "MASTER_ADDR": "here", "NODE_RANK": "0"},
            "4 ranks, which NNODES=3 does not divide",
        ),
        ({"NPROC_PER_NODE": "3"}, "the world has 3 ranks"),
    ],
)
def test_wrong_variables_are_refused_with_a_sentence(
    tiny: Path, variables: dict[str, str], sentence: str
) -> None:
    code, _, errors = launch("tiny", **variables)
    assert code == 2 and sentence in errors and len(errors.splitlines()) == 1, errors


@pytest.mark.parametrize(
    "arguments",
    [["--config", "qwen25_7b"], ["--config=qwen25_7b"], ["qwen25_7b"], ["configs/qwen25_7b.yaml"]],
)
def test_the_config_may_be_named_as_for_main(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert launch(*arguments, "--print-world-size")[:2] == (0, "16\n")


def test_flags_that_only_look_start_no_ranks(tiny: Path) -> None:
    assert "usage: main.py" in launch("tiny", "--help")[1]
    assert "bash launch.sh CONFIG --dry-run" in launch("--help")[1]
    assert launch("tiny", "--config")[0] == launch("--config")[0] == launch("tiny", "--dry")[0] == 2
