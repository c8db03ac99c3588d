"""The table of versions: what is told of a machine that differs, and that setup.cfg installs it."""

from __future__ import annotations

import configparser
import json
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from r1zero.preflight.versions import TESTED, check_versions

ROOT = Path(__file__).resolve().parents[2]
# what comes from elsewhere than pip's index
FROM_SOURCE = {"mindspeed", "CANN"}
ON_CPU = {
    "torch": "2.13.0+cpu",
    "megatron-core": "0.16.1",
    "transformers": TESTED["cpu"]["transformers"][2:],
}
ON_NPU = {
    "torch": "2.7.1+cpu",
    "torch-npu": "2.7.1.post4",
    "megatron-core": "0.16.1",
    "transformers": "4.57.6",
    "mindspeed": "0.16.0",
    "CANN": "9.0.0",
}


def installed_by(extra: str) -> dict[str, str]:
    """The packages of an extra of setup.cfg that this Python gets, with their versions."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.extras_require"][extra].split("\n")
    wanted = [Requirement(line) for line in lines if line]
    return {
        one.name: str(one.specifier) for one in wanted if not one.marker or one.marker.evaluate()
    }


@pytest.mark.parametrize("kind", ["cpu", "npu"])
def test_setup_cfg_installs_what_the_table_names(kind: str) -> None:
    installs = installed_by(kind)
    named = {name: versions for name, versions in TESTED[kind].items() if name not in FROM_SOURCE}
    for name, versions in named.items():
        assert sorted(installs[name].split(",")) == sorted(versions.split(",")), name


def test_torch_npus_range_is_that_of_the_wheels_whose_signatures_are_held() -> None:
    table = ROOT / "tests" / "npu_standin" / "contract" / "operators.json"
    ends = json.loads(table.read_text())["releases"]
    allowed = TESTED["npu"]["torch-npu"]
    assert allowed.startswith(f">={ends['oldest']},")
    assert ends["newest"] in SpecifierSet(allowed)


def test_what_was_tested_passes_on_a_cpu() -> None:
    assert check_versions("cpu", ON_CPU) == []


@pytest.mark.parametrize(
    ("torch", "torch_npu", "cann"),
    [
        ("2.7.1+cpu", "2.7.1.post4", "9.0.0"),
        ("2.8.0+cpu", "2.8.0.post4", "9.0.0"),
        ("2.9.0", "2.9.0.post2", "9.0.0"),
        ("2.10.0", "2.10.0.post4", "9.1.0"),
    ],
)
def test_the_pairs_of_the_docs_pass_on_an_npu(torch: str, torch_npu: str, cann: str) -> None:
    pair = {"torch": torch, "torch-npu": torch_npu, "CANN": cann}
    assert check_versions("npu", ON_NPU | pair) == []


def test_an_old_and_a_missing_package_are_named_with_the_command() -> None:
    old, missing = check_versions("cpu", ON_CPU | {"torch": "2.6.0", "transformers": None})
    assert "torch 2.6.0 is not what was tested" in old and "`pip install 'torch==2.13.0'`" in old
    assert missing.startswith("transformers is not installed; `pip install 'transformers==")


@pytest.mark.parametrize(
    ("torch", "torch_npu"),
    [("2.7.1", "2.7.1.post2"), ("2.8.0", "2.8.0.post2"), ("2.9.0", "2.9.0"), ("2.11.0", "2.11.0")],
)
def test_a_torch_npu_whose_cache_write_lacks_a_keyword_is_named(torch: str, torch_npu: str) -> None:
    told = check_versions("npu", ON_NPU | {"torch": torch, "torch-npu": torch_npu})
    assert any(sentence.startswith(f"torch-npu {torch_npu} is not what was") for sentence in told)


def test_torch_and_torch_npu_of_two_versions_are_named() -> None:
    [pair] = check_versions("npu", ON_NPU | {"torch-npu": "2.9.0.post2"})
    assert "must be of one version" in pair and "torch-npu==2.7.1.*" in pair


@pytest.mark.parametrize("version", ["4.55.4", "5.24.0"])
def test_a_transformers_outside_of_the_range_is_named_on_an_npu(version: str) -> None:
    [sentence] = check_versions("npu", ON_NPU | {"transformers": version})
    assert f"transformers {version} is not what was tested" in sentence


def test_an_old_cann_and_a_missing_mindspeed_are_named_with_the_way_out() -> None:
    cann, speed = sorted(check_versions("npu", ON_NPU | {"CANN": "8.5.0", "mindspeed": None}))
    assert "install CANN 9.0 or newer" in cann and "set_env.sh" in cann
    assert "core_r0.16.0" in speed
