"""tools/convert_ckpt.py on reward models: bit for bit, under the right architecture."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import make_model
from support.reward_models import make_classifier, make_two_layers

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_ckpt.py"


@pytest.fixture
def convert(monkeypatch, capsys):
    """Run the tool. Returns its exit code and what it printed."""
    spec = importlib.util.spec_from_file_location("convert_reward_models", TOOL)
    tool, path = importlib.util.module_from_spec(spec), sys.path[0]
    spec.loader.exec_module(tool)
    sys.path[0] = path  # as a program it puts the repository there

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["convert_ckpt.py", *map(str, words)])
        code = tool.main()
        printed = capsys.readouterr()
        return code, printed.err if code else printed.out

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Reward models in bf16, heads included."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("qwen2_tied", "llama"):
        make_classifier(family, folder / family).bfloat16().save_pretrained(folder / family)
    for name, outputs in (("two_layers", 1), ("process", 2)):
        make_two_layers(folder / name, outputs)
        change(folder / name, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
        edit_config(folder / name, dtype="bfloat16")
    return folder


def change(folder: Path, edit) -> None:
    """Replace the tensors of a folder by what `edit` makes of them."""
    tensors = edit(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **keys: object) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | keys))


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def same(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, to the last bit and of the same types."""
    one, two = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


@pytest.mark.parametrize("words", [["--tp", 2, "--pp", 2], ["--mg-format", "torch_dist"]])
@pytest.mark.parametrize("name", ["qwen2_tied", "llama", "two_layers", "process"])
def test_a_round_trip_is_bit_equal(convert, folders, tmp_path, name, words):
    assert convert("--from", folders / name, "--to", tmp_path / "mg", *words)[0] == 0
    code, printed = convert("--from", tmp_path / "mg", "--to", tmp_path / "hf")
    assert code == 0 and "from: Megatron" in printed
    assert same(folders / name, tmp_path / "hf")
    assert config_of(folders / name) == config_of(tmp_path / "hf")


def test_a_head_that_would_lose_something_is_written_as_it_is(convert, folders, tmp_path):
    """Megatron's head is in fp32 and has a bias; a folder in bf16 keeps both if they matter."""
    convert("--from", folders / "llama", "--to", tmp_path / "mg")
    path = tmp_path / "mg" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["model"]["rm_head.bias"] += 0.1
    content["model"]["rm_head.weight"] += 1e-5
    torch.save(content, path)
    code, printed = convert("--from", tmp_path / "mg", "--to", tmp_path / "hf")
    assert code == 0, printed
    head = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(head["score.weight"], content["model"]["rm_head.weight"])
    assert torch.equal(head["score.bias"], torch.tensor([0.1]))
    assert head["model.norm.weight"].dtype == torch.bfloat16
    again = convert("--from", tmp_path / "hf", "--to", tmp_path / "mg2")
    assert again[0] == 0, again
    path = tmp_path / "mg2" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    model = torch.load(path, weights_only=False)["model"]
    for name in ("rm_head.weight", "rm_head.bias"):
        assert torch.equal(model[name], content["model"][name]), name


def test_a_head_on_a_policys_folder_makes_it_a_reward_model(convert, folders, tmp_path):
    """As MindSpeed-LLM converts: the checkpoint has a head, and the folder is that of the model below
    it. The folder that is written says what it is."""
    base = tmp_path / "base"
    make_model("llama", base).bfloat16().save_pretrained(base)
    convert("--from", folders / "llama", "--to", tmp_path / "mg", "--tp", 2)
    (tmp_path / "mg" / "config.json").unlink()
    words = ["--from", tmp_path / "mg", "--hf-dir", base, "--to", tmp_path / "hf"]
    code, printed = convert(*words)
    assert code == 2 and "rm_head.weight is unexpected" in printed
    assert convert(*words, "--orm")[0] == 0
    assert same(folders / "llama", tmp_path / "hf")
    config = config_of(tmp_path / "hf")
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0"}
    again = ["--from", tmp_path / "hf", "--to", tmp_path / "mg2"]
    assert convert(*again, "--orm")[0] == 0, "what is told twice is not wrong"


def test_what_has_no_head_is_refused(convert, tmp_path):
    make_model("llama", tmp_path / "hf")
    code, printed = convert("--from", tmp_path / "hf", "--to", tmp_path / "mg", "--orm")
    assert code == 2 and "LlamaForCausalLM has no value head" in printed
    assert convert("--from", tmp_path / "hf", "--to", tmp_path / "mg")[0] == 0
    words = ["--from", tmp_path / "mg", "--to", tmp_path / "hf2", "--orm"]
    code, printed = convert(*words)
    assert code == 2 and "rm_head.weight is missing" in printed
    assert not (tmp_path / "hf2").exists()
