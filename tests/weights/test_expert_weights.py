"""Experts on disk: a tensor each in Hugging Face folders, and three ways of Megatron to keep
them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.models import make_model
from support.moe_checkpoints import Layout, exchange_body
from support.multiproc import run_ranks
from transformers import AutoModelForCausalLM

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.params import (
    FIRST,
    WHOLE,
    ShardIndex,
    Shards,
    local_shape,
    merge,
    param_table,
)
from r1zero.weights import huggingface
from r1zero.weights.detect import detect
from r1zero.weights.open import open_weights
from r1zero.weights.save_huggingface import save_hf
from r1zero.weights.save_megatron import LegacyLayout, save_dist, save_legacy

LAYOUTS = {
    # TP rank t has the experts of rank t: of four (TP, EP) pairs two have files
    "qwen3_moe_mixed": Layout(tp=2, pp=2, ep=2, etp=1),
    # no stage in names, and each expert cut in two
    "qwen3_moe": Layout(tp=2, pp=1, ep=2, etp=2),
}


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """A model of each family: in hf/, and as Megatron wrote it from there in legacy/ and dist/.

    Megatron has also read what we wrote from hf/.
    """
    made = {}
    for family, layout in LAYOUTS.items():
        home = made[family] = tmp_path_factory.mktemp(family)
        make_model(family, home / "hf")
        shape = ModelConfig.from_folder(home / "hf")
        weights = open_weights(home / "hf", shape)
        save_dist(home / "from_us_dist", weights, torch.float32)
        if layout.etp == 1:
            stages = (shape.num_layers // layout.pp,) * layout.pp
            ours = LegacyLayout(layout.tp, stages, ep=layout.ep)
            save_legacy(home / "from_us_legacy", weights, torch.float32, ours)
        made[family, "wrong"] = run_ranks(exchange_body, 4, str(home), layout)
        for kind in ("legacy", "dist"):
            shutil.copy(home / "hf" / "config.json", home / kind)
    return made


@pytest.fixture(params=LAYOUTS)
def home(request, homes) -> Path:
    return homes[request.param]


def read_all(path, shape, index=FIRST, shards=WHOLE):
    weights = open_weights(path, shape)
    return {tensor.name: weights.read(tensor, index, shards) for tensor in param_table(shape)}


def differing(found, expected):
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


# Hugging Face folders.


def test_an_expert_is_gate_above_up_and_comes_after_the_expert_before(home):
    shape = ModelConfig.from_folder(home / "hf")
    state = load_file(home / "hf" / "model.safetensors")
    whole = read_all(home / "hf", shape)
    for expert in range(8):
        place = f"model.layers.1.mlp.experts.{expert}"
        gate_up = [state[f"{place}.{part}_proj.weight"] for part in ("gate", "up")]
        fc1 = whole["decoder.layers.1.mlp.experts.linear_fc1.weight"][expert]
        assert torch.equal(fc1, torch.cat(gate_up))
        fc2 = whole["decoder.layers.1.mlp.experts.linear_fc2.weight"][expert]
        assert torch.equal(fc2, state[f"{place}.down_proj.weight"])
    router = state["model.layers.1.mlp.gate.weight"]
    assert torch.equal(whole["decoder.layers.1.mlp.router.weight"], router)


def test_the_table_names_every_tensor_of_the_folder_once(home):
    shape = ModelConfig.from_folder(home / "hf")
    state = load_file(home / "hf" / "model.safetensors")
    named = {}
    for tensor in param_table(shape):
        named |= dict(zip(tensor.hf, tensor.hf_shape, strict=True))
    assert named == {name: tuple(value.shape) for name, value in state.items()}
    assert shape.num_parameters == sum(value.numel() for value in state.values())


@pytest.mark.parametrize("kind", ["hf", "legacy", "dist"])
@pytest.mark.parametrize("shards", [Shards(tp=2, ep=4), Shards(tp=1, ep=8)])
def test_parts_of_expert_ranks_are_the_whole(home, kind, shards):
    shape = ModelConfig.from_folder(home / "hf")
    whole = read_all(home / "hf", shape)
    ranks = range(max(shards.tp, shards.ep))
    places = [ShardIndex(rank % shards.tp, rank % shards.ep) for rank in ranks]
    parts = [read_all(home / kind, shape, place, shards) for place in places]
    for tensor in param_table(shape):
        own = [part[tensor.name] for part in parts[: shards.of(tensor)]]
        assert all(part.shape == local_shape(tensor, shards) for part in own)
        assert torch.equal(merge(tensor, own), whole[tensor.name]), tensor.name


def test_an_expert_rank_reads_its_own_experts_only(home, monkeypatch):
    asked = []

    class Recorder:
        def __init__(self, path, framework):
            self.file = safe_open(path, framework=framework)
            self.keys = self.file.keys

        def get_slice(self, name):
            asked.append(name)
            return self.file.get_slice(name)

    monkeypatch.setattr(huggingface, "safe_open", Recorder)
    shape = ModelConfig.from_folder(home / "hf")
    read_all(home / "hf", shape, ShardIndex(ep=3), Shards(ep=4))
    experts = {name.split(".")[5] for name in asked if ".mlp.experts." in name}
    assert experts == {"6", "7"}


def test_more_expert_ranks_than_experts_are_refused(home):
    shape = ModelConfig.from_folder(home / "hf")
    with pytest.raises(BadInput, match="has 8 slices .* expert parallel size 3 does not divide"):
        read_all(home / "hf", shape, FIRST, Shards(ep=3))


@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_export_is_bit_equal_and_transformers_reads_it(home, tmp_path, shard_bytes):
    shape = ModelConfig.from_folder(home / "hf")
    stream = open_weights(home / "hf", shape).stream(
        param_table(shape), FIRST, WHOLE, torch.float32
    )
    save_hf(tmp_path / "saved", shape, stream, home / "hf", "float32", shard_bytes)
    saved = {}
    for file in (tmp_path / "saved").glob("*.safetensors"):
        saved |= load_file(file)
    assert not differing(saved, load_file(home / "hf" / "model.safetensors"))
    tokens = torch.arange(12).view(1, 12)
    logits = [
        AutoModelForCausalLM.from_pretrained(path)(tokens).logits
        for path in (home / "hf", tmp_path / "saved")
    ]
    assert torch.equal(*logits)


# Megatron.


@pytest.mark.parametrize("family", LAYOUTS)
def test_megatron_loads_what_we_write(homes, family):
    assert homes[family, "wrong"] == [[]] * 4


@pytest.mark.parametrize("kind", ["legacy", "dist"])
def test_what_megatron_wrote_is_read(home, kind):
    shape = ModelConfig.from_folder(home / "hf")
    assert not differing(read_all(home / kind, shape), read_all(home / "hf", shape))


def test_expert_ranks_are_told_from_stages(homes):
    for family, text in (("qwen3_moe_mixed", "TP2 PP2 EP2"), ("qwen3_moe", "TP2 PP1 EP2")):
        shape = ModelConfig.from_folder(homes[family] / "hf")
        weights = open_weights(homes[family] / "legacy", shape)
        assert str(weights.found).endswith(f"iteration 7, saved at {text}")


def rename_experts(folder, rename):
    """Apply `rename` to the experts' tensors of each file of a legacy checkpoint."""
    for path in folder.glob("iter_*/mp_rank_*/model_optim_rng.pt"):
        content = torch.load(path, weights_only=False)
        content["model"] = rename(content["model"])
        torch.save(content, path)


def as_te_grouped(state):
    """TEGroupedMLP's names: linear_fc1.weight3 of the expert 3."""
    renamed = {}
    for name, value in state.items():
        head, _, tail = name.partition(".local_experts.")
        expert, _, rest = tail.partition(".")
        renamed[f"{head}.{rest}{expert}" if tail else name] = value
    return renamed


def as_grouped(state):
    """GroupedMLP's two tensors, whose forward pass views them as [experts, in, out]."""
    stacks = {}
    renamed = {}
    for name, value in state.items():
        head, _, tail = name.partition(".local_experts.")
        if not tail or value is None:
            renamed[name] = value
            continue
        weight = "weight1" if "linear_fc1" in tail else "weight2"
        stacks.setdefault(f"{head}.{weight}", []).append(value.t())  # [in, out]
    for name, experts in stacks.items():
        columns = experts[0].shape[0] if name.endswith("weight1") else None
        stacked = torch.stack(experts)
        shape = (columns, -1) if columns else (-1, stacked.shape[2])
        renamed[name] = stacked.contiguous().view(shape)
    return renamed


@pytest.mark.parametrize("rename", [as_te_grouped, as_grouped])
def test_other_modules_for_experts_are_read(home, tmp_path, rename):
    shutil.copytree(home / "legacy", tmp_path / "legacy")
    rename_experts(tmp_path / "legacy", rename)
    shape = ModelConfig.from_folder(home / "hf")
    assert not differing(read_all(tmp_path / "legacy", shape), read_all(home / "hf", shape))


def test_grouped_experts_are_written_as_they_are_read(home, tmp_path):
    shape = ModelConfig.from_folder(home / "hf")
    weights = open_weights(home / "hf", shape)
    for grouped, folder in ((False, tmp_path / "one"), (True, tmp_path / "two")):
        layout = LegacyLayout(2, (4,), ep=4, grouped_experts=grouped)
        save_legacy(folder, weights, torch.float32, layout)
    one, two = (
        torch.load(folder / "iter_0000001/mp_rank_01_003/model_optim_rng.pt", weights_only=False)
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert not differing(two["model"], as_grouped(one["model"]))


def test_missing_experts_and_misshaped_ones_are_told(home, tmp_path):
    def damage(state):
        del state["decoder.layers.1.mlp.experts.local_experts.2.linear_fc2.weight"]
        state["decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.weight"] = torch.zeros(5, 64)
        return state

    shutil.copytree(home / "legacy", tmp_path / "legacy")
    rename_experts(tmp_path / "legacy", damage)
    shape = ModelConfig.from_folder(home / "hf")
    with pytest.raises(BadInput) as refused:
        open_weights(tmp_path / "legacy", shape)
    for module in ("linear_fc1", "linear_fc2"):
        assert f"decoder.layers.1.mlp.experts.{module}.weight has" in str(refused.value)


def test_a_missing_file_of_an_expert_rank_is_told(home, tmp_path):
    shutil.copytree(home / "legacy", tmp_path / "legacy")
    shutil.rmtree(next((tmp_path / "legacy").glob("iter_*/mp_rank_01*_001")))
    with pytest.raises(BadInput, match="lacks model_optim_rng.pt in mp_rank_0"):
        detect(tmp_path / "legacy")
