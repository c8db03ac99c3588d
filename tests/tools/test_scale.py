"""tools/scale.py: worlds of any size, and models that are not in the repository."""

from __future__ import annotations

import json
import resource
from math import prod
from pathlib import Path
from typing import Any

import pytest
from support.tool import functions, run_here

ROOT = Path(__file__).resolve().parents[2]
# but for those whose models are made on first use
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("[!t]*.yaml"))
TRAIN_72B = "--train 2048 --train-tp 8 --train-pp 8 --rollout 4096 --rollout-tp 8".split()


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert run_here("scale.py", *arguments, "--json") == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_config_in_worlds_of_several_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    small, large = lines(capsys, "--config", "qwen25_7b", "--ranks", "16", "256")
    assert [small["roles"][role]["ranks"] for role in ("train", "rollout", "ref")] == [8, 6, 2]
    assert [large["roles"][role]["ranks"] for role in ("train", "rollout", "ref")] == [128, 96, 32]
    shard = small["roles"]["rollout"]["published_in"]
    assert shard == large["roles"]["rollout"]["published_in"] == pytest.approx(7.6e9, rel=0.01)


def test_thousands_of_ranks_are_in_a_dozen_groups_each(capsys: pytest.CaptureFixture[str]) -> None:
    [found] = lines(capsys, "--model", "72b", *TRAIN_72B)
    assert found["world_size"] == 6144 and found["roles"].keys() == {"train", "rollout"}
    assert found["roles"]["rollout"]["publish_groups"] <= 16
    assert found["roles"]["rollout"]["published_in"] == pytest.approx(18.2e9, rel=0.01)


def test_rollout_shares_experts_only_where_it_is_asked_to(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """TP 4 in the configuration, so two replicas of TP 2 do not hold a quarter of the experts each."""
    [whole] = lines(capsys, "--config", "qwen3_30b_a3b", "--rollout-tp", "2")
    [shared] = lines(capsys, "--config", "qwen3_30b_a3b", "--rollout-tp", "2", "--rollout-ep", "4")
    assert whole["roles"]["rollout"]["published_in"] == pytest.approx(30.5e9, rel=0.01)
    assert shared["roles"]["rollout"]["published_in"] == pytest.approx(16.0e9, rel=0.01)


LARGE_EXPERTS = """
    --model qwen3_235b --train 128 --train-tp 4 --train-pp 8 --train-ep 16 --train-layers 11 12 12 12 12 12 12 11
    --rollout 32 --rollout-tp 4
""".split()


def test_235b_is_planned_with_few_groups_and_little_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each rollout rank has 32 sources: 8 stages, and 4 of the 16 parts of their experts."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    [found] = lines(capsys, *LARGE_EXPERTS)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 30  # seconds of the processor; half a second
    assert after.ru_maxrss < 2 * 2**20  # kilobytes
    roles = found["roles"]
    assert roles["rollout"]["publish_groups"] == 16 and roles["train"]["publish_groups"] == 1
    # a quarter of 235.1 billion parameters, and of each uncut one the whole
    assert roles["rollout"]["published_in"] == pytest.approx(235.1e9 / 4 * 2, rel=0.001)
    assert roles["train"]["published_out"] == pytest.approx(4.06e9, rel=0.01)
    assert roles["train"]["published_in"] == pytest.approx(4.06e9, rel=0.01)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rank_of_a_shipped_configuration_is_in_two_dozen_groups_at_most(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    [found] = lines(capsys, "--config", name)
    for role in found["roles"].values():
        assert role["device_groups"] + role["publish_groups"] <= 24


def test_replicas_in_proportion_hold_all_experts(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model qwen3_30b --train 16 --train-tp 2 --train-pp 2 --train-ep 8 --rollout 8"
    [found] = lines(capsys, *arguments.split(), "--rollout-tp", "4", "--ranks", "60")
    assert [found["roles"][role]["ranks"] for role in ("train", "rollout")] == [32, 28]
    shared = (*arguments.split(), "--rollout-tp", "4", "--rollout-ep", "8", "--ranks", "60")
    [found] = lines(capsys, *shared)
    assert [found["roles"][role]["ranks"] for role in ("train", "rollout")] == [32, 24]


def test_flags_and_overrides_win_over_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    [found] = lines(capsys, "--config", "tiny", "--rollout", "4", "training.seq_length=40")
    assert found["roles"]["rollout"]["ranks"] == 4
    [longer] = lines(capsys, "--config", "tiny", "--rollout", "4", "--tokens", "80")
    assert longer["roles"]["train"]["samples_in"] > found["roles"]["train"]["samples_in"]


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("scale.py", "--config", "tiny") == 0
    out = capsys.readouterr().out
    assert "tiny on 4 ranks: train 1 (TP 1, PP 1, DP 1), rollout 2" in out
    assert "HCCL GB" in out and "pieces, planned in" in out


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--model", "72b"], "with --train and --rollout"),
        (
            ["--config", "tiny", "--ranks", "2"],
            "too few for one replica of each role; 3 would work",
        ),
        (["--config", "qwen25_7b", "--train-tp", "3", "--train", "12"], "does not divide"),
        (["--model", "7b", "--train", "1", "--rollout", "1", "a.b=1"], "is of a configuration"),
    ],
)
def test_a_world_that_cannot_be_is_refused(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here("scale.py", *arguments) == 2
    assert sentence in capsys.readouterr().err


def test_built_in_models_have_the_parameters_of_the_real_ones() -> None:
    built = functions("scale.py")["NETWORKS"]

    def parameters(name: str, layers: range | None = None) -> float:
        tensors = built[name]().tensors
        sizes = [prod(one.view) for one in tensors if layers is None or one.layer in layers]
        return sum(sizes) / 1e9

    # As the models' cards state them, in thousands of millions.
    assert parameters("qwen3_30b") == pytest.approx(30.5, abs=0.05)
    assert parameters("qwen3_235b") == pytest.approx(235.1, abs=0.05)
    assert parameters("7b") == pytest.approx(7.6156, abs=1e-4)
    assert parameters("32b") == pytest.approx(32.76, abs=0.01)
    assert parameters("72b") == pytest.approx(72.71, abs=0.01)
    three_more = parameters("deepseek_v3", range(61, 64))
    assert parameters("deepseek_v3") - three_more == pytest.approx(671, abs=0.1)
