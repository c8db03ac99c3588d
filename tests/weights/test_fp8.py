"""Folders in fp8 with scales of blocks are read as the numbers that they stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import make_model
from support.worlds import SHORT, metrics, run

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.params import ShardIndex, Shards, merge, param_table
from r1zero.weights.open import open_weights

LARGEST = 448.0  # in e4m3
BLOCK = (16, 24)  # neither divides a side of the small models
# What the published models leave as it is.
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.weight", "bias")


def quantize(folder: Path, block: tuple[int, int] = BLOCK) -> dict[str, torch.Tensor]:
    """Write the matrices of a folder in fp8, as the published models have them; returns what each
    stands for, by loops over blocks."""
    tensors = load_file(folder / "model.safetensors")
    written = {}
    meant = {}
    for name, tensor in tensors.items():
        if any(part in name for part in KEPT):
            written[name] = meant[name] = tensor
            continue
        rows = range(0, tensor.shape[0], block[0])
        columns = range(0, tensor.shape[1], block[1])
        values = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty(len(rows), len(columns))
        plain = torch.empty(tensor.shape)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                place = (slice(row, row + block[0]), slice(column, column + block[1]))
                scale = tensor[place].abs().max().float() / LARGEST
                values[place] = (tensor[place].float() / scale).to(torch.float8_e4m3fn)
                scales[i, j] = scale
                plain[place] = values[place].float() * scale
        written[name] = values
        written[f"{name}_scale_inv"] = scales
        meant[name] = plain
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def pair(request, tmp_path_factory) -> tuple[Path, Path]:
    """A folder in fp8, and one of what it stands for in fp32."""
    plain = tmp_path_factory.mktemp(request.param) / "plain"
    make_model(request.param, plain)
    fp8 = shutil.copytree(plain, plain.with_name("fp8"))
    save_file(quantize(fp8), plain / "model.safetensors", metadata={"format": "pt"})
    return fp8, plain


@pytest.mark.parametrize("shards", [Shards(), Shards(tp=2), Shards(tp=2, ep=4)])
def test_every_shard_is_cut_from_the_numbers_that_are_meant(pair, shards):
    fp8, plain = pair
    shape = ModelConfig.from_folder(fp8)
    if shape.experts is None and shards.ep > 1:
        shards = Shards(tp=4)
    found = open_weights(fp8, shape)
    expected = open_weights(plain, shape)
    for tensor in param_table(shape):
        parts = []
        for rank in range(shards.of(tensor)):
            index = ShardIndex(rank, rank)
            parts.append(found.read(tensor, index, shards))
            assert torch.equal(parts[-1], expected.read(tensor, index, shards)), tensor.name
        assert torch.equal(merge(tensor, parts), expected.read(tensor)), tensor.name


def without(folder: Path, target: Path, key: str) -> Path:
    """A copy without a key of config.json."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    del config[key]
    (target / "config.json").write_text(json.dumps(config))
    return target


NAME = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (None, f"{NAME}_scale_inv is missing"),
        (torch.float64, f"{NAME}_scale_inv has the type F64 instead of F32"),
        ((1, 1), rf"{NAME}_scale_inv has the shape \(1, 1\) instead of \("),
    ],
)
def test_scales_that_are_none_are_refused(pair, tmp_path, change, sentence):
    folder = shutil.copytree(pair[0], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    scales = tensors.pop(f"{NAME}_scale_inv")
    if isinstance(change, tuple):
        tensors[f"{NAME}_scale_inv"] = torch.ones(change)
    elif change is not None:
        tensors[f"{NAME}_scale_inv"] = scales.to(change)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadInput, match=sentence):
        open_weights(folder, ModelConfig.from_folder(folder))


def test_fp8_that_config_json_does_not_tell_of_is_refused(pair, tmp_path):
    folder = without(pair[0], tmp_path / "model", "quantization_config")
    sentence = "has the type F8_E4M3, and config.json has no quantization_config"
    with pytest.raises(BadInput, match=sentence):
        open_weights(folder, ModelConfig.from_folder(folder))


def test_a_run_begins_with_it_and_writes_a_model_that_is_not(tiny, tmp_path):
    """The trainer and the engine read the same numbers."""
    folder = shutil.copytree(tiny / "model", tmp_path / "fp8")
    quantize(folder, (128, 128))
    job = [*SHORT, "training.train_iters=1", f"actor_rollout.load={folder}", f"ref.load={folder}"]
    done = run(tmp_path / "run", 1, "tiny", job)
    [step] = metrics(done)
    assert step["mismatch/max"] < 1e-4
    assert step["kl"] < 1e-6, "policy and reference begin alike"
    assert "quantization_config" not in json.loads((done / "model" / "config.json").read_text())
    saved = load_file(done / "model" / "model.safetensors")
    assert not any(name.endswith("_scale_inv") for name in saved)
