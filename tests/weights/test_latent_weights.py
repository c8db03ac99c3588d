"""DeepSeek-V3 and Moonlight on disk: Hugging Face folders, Megatron's two forms, and what stays fp32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import make_model
from support.moe_checkpoints import Layout, exchange_body
from support.multiproc import run_ranks

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.params import FIRST, WHOLE, ShardIndex, Shards, param_table
from r1zero.weights.open import open_weights
from r1zero.weights.save_huggingface import save_hf
from r1zero.weights.save_megatron import LegacyLayout, save_dist, save_legacy

FAMILIES = ["deepseek_v3", "moonlight"]
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model."""
    made = tmp_path_factory.mktemp(request.param) / "hf"
    make_model(request.param, made)
    return made


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def with_tensors(folder: Path, **more: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **more}, path)


def with_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("kind", ["dist", "legacy"])
@pytest.mark.parametrize(
    ("index", "shards"), [(FIRST, WHOLE), (ShardIndex(tp=1, ep=3), Shards(tp=2, ep=4))]
)
def test_what_megatron_is_given_is_what_the_folder_holds(folder, tmp_path, kind, index, shards):
    shape = ModelConfig.from_folder(folder)
    weights = open_weights(folder, shape)
    if kind == "dist":
        save_dist(tmp_path / "megatron", weights, torch.bfloat16)
    else:
        layout = LegacyLayout(tp=2, layers=(1, 3), ep=2)
        save_legacy(tmp_path / "megatron", weights, torch.bfloat16, layout)
    read = open_weights(tmp_path / "megatron", shape)
    assert read.dtypes == {torch.bfloat16}
    for tensor in param_table(shape):
        expected = weights.read(tensor, index, shards)
        if not tensor.fp32:
            expected = expected.bfloat16()
        assert torch.equal(read.read(tensor, index, shards), expected), tensor.name


# Experts are dealt to the replicas of each of two stages.
MEGATRON = Layout(tp=1, pp=2, ep=2, etp=1)


def test_megatrons_own_latent_attention_writes_what_is_read_and_reads_what_is_written(
    folder, tmp_path
):
    """GPTModel of megatron-core with MLASelfAttention, both of its checkpoints."""
    copied(folder, tmp_path / "hf")
    shape = ModelConfig.from_folder(folder)
    weights = open_weights(folder, shape)
    save_dist(tmp_path / "from_us_dist", weights, torch.float32)
    layout = LegacyLayout(tp=1, layers=(2, 2), ep=2)
    save_legacy(tmp_path / "from_us_legacy", weights, torch.float32, layout)
    assert run_ranks(exchange_body, 4, str(tmp_path), MEGATRON) == [[]] * 4
    for kind in ("legacy", "dist"):
        read = open_weights(tmp_path / kind, shape)
        for tensor in param_table(shape):
            assert torch.equal(read.read(tensor), weights.read(tensor)), tensor.name


def test_a_folder_that_is_written_is_the_one_that_was_read_but_for_its_type(folder, tmp_path):
    shape = ModelConfig.from_folder(folder)
    weights = open_weights(folder, shape)
    stream = weights.stream(param_table(shape), FIRST, WHOLE, torch.bfloat16)
    save_hf(tmp_path / "out", shape, stream, folder, "bfloat16")
    expected = load_file(folder / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        kept = value if name.endswith("e_score_correction_bias") else value.bfloat16()
        assert torch.equal(found[name], kept), name
    assert found[BIAS].dtype == torch.float32
    assert ModelConfig.from_folder(tmp_path / "out").further_layers == 0


def test_layers_that_predict_further_tokens_are_passed_over(folder, tmp_path):
    """The published folders have one, layer 61."""
    made = copied(folder, tmp_path / "hf")
    with_tensors(made, **{"model.layers.4.eh_proj.weight": torch.zeros(2, 2)})
    with_config(made, num_nextn_predict_layers=1)
    shape = ModelConfig.from_folder(made)
    plain = open_weights(folder, ModelConfig.from_folder(folder))
    found = open_weights(made, shape)
    for tensor in param_table(shape):
        assert torch.equal(found.read(tensor), plain.read(tensor))


def test_a_layer_more_than_config_json_tells_of_is_refused(folder, tmp_path):
    made = copied(folder, tmp_path / "hf")
    with_tensors(made, **{"model.layers.5.eh_proj.weight": torch.zeros(2, 2)})
    with_config(made, num_nextn_predict_layers=1)
    with pytest.raises(BadInput, match=r"model.layers.5.eh_proj.weight is unexpected"):
        open_weights(made, ModelConfig.from_folder(made))
