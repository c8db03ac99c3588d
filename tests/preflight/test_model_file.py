"""A model file that stands in for the model folder describes the network by itself."""

from __future__ import annotations

from typing import Any

import pytest

from r1zero.config.schema import Config
from r1zero.preflight.checks import check
from r1zero.preflight.resolve import load_config

ABSENT = ["actor_rollout.load=/not/here", "ref.load=/not/here"]
NAME = "qwen3-30b-a3b"


def config_without(*missing: str) -> Config:
    """The 30B configuration without its model folder, its model file without these keys."""
    cfg, _ = load_config("qwen3_30b_a3b", ABSENT)
    keys: dict[str, Any] = cfg.model[NAME]
    for key in missing:
        del keys[key]
    return cfg


@pytest.mark.parametrize("key", ["num_experts", "moe_router_topk", "moe_ffn_hidden_size"])
def test_a_file_that_names_its_family_must_have_what_the_family_needs(key: str) -> None:
    assert check(config_without(), absent_ok=True) == []
    [problem] = check(config_without(key), absent_ok=True)
    assert problem == f"model {NAME}: {key} is missing, which hf_model_type qwen3_moe needs; add it"


def test_a_file_that_names_no_family_may_say_a_few_keys() -> None:
    cfg = config_without("hf_model_type", "num_experts", "hidden_size")
    assert check(cfg, absent_ok=True) == []
