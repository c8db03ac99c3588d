"""tools/convert_ckpt.py: both ways, bit for bit; and megatron-core itself runs what it writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.megatron_checkpoints import TOKENS, read_body
from support.models import FAMILIES, make_model
from support.multiproc import run_ranks

from r1zero.preflight.checks import check
from r1zero.preflight.found import look
from r1zero.preflight.resolve import load_config
from r1zero.weights.huggingface import HuggingFaceWeights

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_ckpt.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("convert_ckpt", TOOL)
    module, path = importlib.util.module_from_spec(spec), sys.path[0]
    spec.loader.exec_module(module)
    sys.path[0] = path  # as a program it puts the repository there
    return module


@pytest.fixture
def convert(tool, monkeypatch, capfd):
    """Run the tool. Returns (exit code, what it printed). Forked ranks want a real standard error:
    capfd."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["convert_ckpt.py", *map(str, words)])
        code = tool.main()
        printed = capfd.readouterr()
        return code, printed.err if code else printed.out

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A bf16 folder of each family, with a tokenizer file."""
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp("models") / family
        make_model(family, made[family]).to(torch.bfloat16).save_pretrained(made[family])
        (made[family] / "tokenizer.json").write_text('{"a": 1}')
    return made


def same(folder: Path, other: Path) -> bool:
    """Whether two model folders hold the same tensors bit for bit."""
    one, two = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "words",
    [
        ["--tp", 1],
        ["--tp", 2, "--pp", 2],
        ["--tp", 4, "--pp", 4],
        ["--mg-format", "torch_dist"],
        ["--tp", 2, "--pp", 3, "--num-layer-list", "1,2,1", "--make-vocab-size-divisible-by", 100],
    ],
)
def test_round_trip_is_bit_equal(convert, folders, tmp_path, family, words):
    assert convert("--from", folders[family], "--to", tmp_path / "mg", *words)[0] == 0
    code, printed = convert("--from", tmp_path / "mg", "--to", tmp_path / "hf")
    assert code == 0 and "from: Megatron" in printed
    assert f"to:   Hugging Face folder {tmp_path / 'hf'}, bf16" in printed
    assert same(folders[family], tmp_path / "hf")
    for name in ("config.json", "tokenizer.json"):
        before, after = (folder / name for folder in (folders[family], tmp_path / "hf"))
        assert json.loads(before.read_text()) == json.loads(after.read_text())


def test_flags_of_the_converter_before_work_as_they_did(convert, folders, tmp_path):
    common = [
        "--use-mcore-models",
        "--model-type",
        "GPT",
        "--params-dtype",
        "bf16",
        "--add-qkv-bias",
        "--model_type_hf",
        "llama2",
        "--target-tensor-parallel-size=2",
        "--target_pipeline_parallel_size",
        2,
    ]
    assert (
        convert(
            "--load-model-type",
            "hf",
            "--save-model-type",
            "mg",
            "--load-dir",
            folders["qwen2"],
            "--save-dir",
            tmp_path / "ckpt",
            "--tokenizer-model",
            "tokenizer.json",
            *common,
        )[0]
        == 0
    )
    folder = tmp_path / "ckpt" / "iter_0000001"
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == "1"
    names = [f"mp_rank_0{tp}_00{pp}" for tp in (0, 1) for pp in (0, 1)]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in ("config.json", "tokenizer.json"):
        # nor did it copy them: the way back names the original's folder
        (tmp_path / "ckpt" / name).unlink()
    original = tmp_path / "original"
    original.mkdir()
    (original / "config.json").write_text((folders["qwen2"] / "config.json").read_text())
    assert (
        convert(
            "--load-model-type",
            "mg",
            "--save-model-type",
            "hf",
            "--load-dir",
            tmp_path / "ckpt",
            "--save-dir",
            original,
            *common[:-3],
        )[0]
        == 0
    )
    assert same(folders["qwen2"], original / "mg2hf")


@pytest.mark.parametrize("grouped", [[], ["--moe-grouped-gemm"]])
def test_experts_are_shared_out_by_the_flags_of_the_converter_before(
    convert, folders, tmp_path, grouped
):
    words = [
        "--model-type-hf",
        "qwen3-moe",
        "--target-tensor-parallel-size",
        2,
        "--target-expert-parallel-size",
        4,
        "--expert-tensor-parallel-size",
        1,
        *grouped,
    ]
    code, printed = convert(
        "--load-dir", folders["qwen3_moe"], "--save-dir", tmp_path / "mg", *words
    )
    assert code == 0 and "saved at TP2 PP1 EP4, bf16" in printed
    folder = tmp_path / "mg" / "iter_0000001"
    names = [f"mp_rank_0{tp}_00{ep}" for tp in (0, 1) for ep in range(4)]
    assert sorted(path.name for path in folder.iterdir()) == names
    code, printed = convert("--load-dir", tmp_path / "mg", "--save-dir", tmp_path / "hf")
    assert code == 0 and "saved at TP2 PP1 EP4" in printed
    assert same(folders["qwen3_moe"], tmp_path / "hf")


def test_arguments_of_a_checkpoint_tell_its_experts(convert, folders, tmp_path):
    source = folders["qwen3_moe_mixed"]
    assert convert("--from", source, "--to", tmp_path / "a", "--pp", 2, "--ep", 2)[0] == 0
    (tmp_path / "a" / "config.json").unlink()
    words = ["--to-type", "mg", "--ckpt-format", "torch_dist"]
    assert convert("--from", tmp_path / "a", "--to", tmp_path / "b", *words)[0] == 0
    words = ["--to-type", "hf", "--hf-dir", source]
    assert convert("--from", tmp_path / "b", "--to", tmp_path / "hf", *words)[0] == 0
    assert same(source, tmp_path / "hf")


def test_vocabulary_is_padded_with_its_last_row(convert, folders, tmp_path):
    assert (
        convert(
            "--from",
            folders["qwen2"],
            "--to",
            tmp_path / "mg",
            "--tp",
            2,
            "--make-vocab-size-divisible-by",
            100,
        )[0]
        == 0
    )
    shards = [
        torch.load(
            tmp_path / f"mg/iter_0000001/mp_rank_0{t}/model_optim_rng.pt", weights_only=False
        )
        for t in (0, 1)
    ]
    rows = torch.cat([shard["model"]["embedding.word_embeddings.weight"] for shard in shards])
    source = load_file(folders["qwen2"] / "model.safetensors")["model.embed_tokens.weight"]
    assert len(rows) == 600 and torch.equal(rows[:512], source)
    assert (rows[512:] == source[-1]).all() and shards[0]["args"].padded_vocab_size == 600


def test_one_megatron_layout_becomes_another_without_config_json(convert, folders, tmp_path):
    convert("--from", folders["qwen3"], "--to", tmp_path / "a", "--tp", 2, "--pp", 2)
    (tmp_path / "a" / "config.json").unlink()
    assert (
        convert("--from", tmp_path / "a", "--to", tmp_path / "b", "--to-type", "mg", "--pp", 4)[0]
        == 0
    )
    assert (
        convert(
            "--from",
            tmp_path / "b",
            "--to",
            tmp_path / "c",
            "--to-type",
            "mg",
            "--ckpt-format",
            "torch_dist",
        )[0]
        == 0
    )
    assert (
        convert("--from", tmp_path / "c", "--to", tmp_path / "hf", "--hf-dir", folders["qwen3"])[0]
        == 0
    )
    assert same(folders["qwen3"], tmp_path / "hf")


def test_type_is_that_of_the_source_or_the_one_asked_for(convert, folders, tmp_path):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    state = load_file(folders["llama"] / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].float()
    save_file(state, mixed / "model.safetensors")
    (mixed / "config.json").write_text((folders["llama"] / "config.json").read_text())
    code, printed = convert("--from", mixed, "--to", tmp_path / "mg")
    assert code == 2 and "bf16, fp32" in printed and "--params-dtype" in printed
    assert convert("--from", mixed, "--to", tmp_path / "mg", "--dtype", "fp32")[0] == 0
    assert "fp32" in convert("--from", tmp_path / "mg", "--to", tmp_path / "hf")[1]
    assert torch.equal(
        load_file(tmp_path / "hf" / "model.safetensors")["model.norm.weight"],
        state["model.norm.weight"],
    )


@pytest.mark.parametrize("words", [["--pp", 2], ["--ckpt-format", "torch_dist"]])
def test_converted_folder_is_all_that_a_run_needs(convert, tiny, tmp_path, words):
    assert convert("--from", tiny / "model", "--to", tmp_path / "mg", *words)[0] == 0
    cfg, _ = load_config("tiny", [f"actor_rollout.load={tmp_path / 'mg'}"])
    assert check(cfg) == []
    assert (
        look(cfg).reference.folder == tmp_path / "mg" == Path(cfg.training.tokenizer_name_or_path)
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied"])
def test_megatron_core_runs_what_was_converted(convert, tmp_path, family):
    model = make_model(family, tmp_path / "hf")
    with torch.no_grad():
        expected = model(TOKENS).logits
    for kind, words in (
        ("legacy", ["--tp", 2, "--pp", 2]),
        ("torch_dist", ["--mg-format", "torch_dist"]),
    ):
        assert convert("--from", tmp_path / "hf", "--to", tmp_path / kind, *words)[0] == 0
        ranks = run_ranks(
            read_body, 4, str(tmp_path / kind / "iter_0000001"), kind, family.endswith("tied")
        )
        [found] = [part for part in ranks if part is not None]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        (["--to", "{new}"], ["--load-dir", "required"]),
        (["--from", "{new}", "--to", "{new}"], ["{new} is not a folder"]),
        (["--from", "{empty}", "--to", "{new}"], ["{empty} holds no weights"]),
        (
            ["--from", "{hf}", "--to", "{new}", "--load-model-type", "mg"],
            ["--load-model-type mg", "Hugging"],
        ),
        (
            ["--from", "{hf}", "--to", "{new}", "--tp", "3"],
            ["3 does not divide num_attention_heads 4"],
        ),
        (["--from", "{hf}", "--to", "{new}", "--tp", "0"], ["at least 1"]),
        (["--from", "{hf}", "--to", "{new}", "--ep", "2"], ["this model has no experts"]),
        (
            ["--from", "{hf}", "--to", "{new}", "--moe-grouped-gemm"],
            ["--moe-grouped-gemm: this model has no experts"],
        ),
        (
            ["--from", "{moe}", "--to", "{new}", "--ckpt-format", "torch_dist", "--ep", "2"],
            ["--target-expert-parallel-size 2: torch_dist fits any; leave it out"],
        ),
        (
            ["--from", "{moe}", "--to", "{new}", "--mg-format", "torch_dist", "--moe-grouped-gemm"],
            ["--moe-grouped-gemm: torch_dist"],
        ),
        (
            ["--from", "{moe}", "--to", "{new}", "--ep", "3"],
            ["--target-expert-parallel-size 3 does not divide num_experts 8"],
        ),
        (
            ["--from", "{hf}", "--to", "{new}", "--pp", "3"],
            ["3 does not divide num_layers 4", "--num-layer"],
        ),
        (
            ["--from", "{hf}", "--to", "{new}", "--pp", "2", "--num-layer-list", "2,3"],
            ["2,3", "add up to 4"],
        ),
        (["--from", "{hf}", "--to", "{new}", "--params-dtype", "int8"], ["--params-dtype", "int8"]),
        (["--from", "{hf}", "--to", "{hf}"], ["--save-dir", "{hf} exists and is not empty"]),
        (["--from", "{hf}", "--to", "{hf}/config.json"], ["--save-dir", "exists"]),
        (["--from", "{mg}", "--to", "{new}"], ["{mg} has no config.json", "--hf-dir"]),
        (
            ["--from", "{mg}", "--to", "{new}", "--hf-dir", "{empty}"],
            ["{empty} has no config.json"],
        ),
        (
            ["--from", "{mg}", "--to", "{new}", "--hf-dir", "{other}"],
            ["{mg}/iter_0000001", "do not fit"],
        ),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    convert, folders, tmp_path, words, pieces
):
    (tmp_path / "empty").mkdir()
    convert("--from", folders["qwen2"], "--to", tmp_path / "mg")
    (tmp_path / "mg" / "config.json").unlink()
    names = {
        "hf": folders["qwen2"],
        "moe": folders["qwen3_moe"],
        "other": folders["llama"],
        **{name: tmp_path / name for name in ("empty", "mg", "new")},
    }
    before = sorted(tmp_path.rglob("*"))
    code, printed = convert(*(word.format(**names) for word in words))
    assert code == 2 and printed.startswith("convert_ckpt: ") and len(printed.splitlines()) == 1
    for piece in pieces:
        assert piece.format(**names) in printed
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "words", [["--tp", 2, "--pp", 2], ["--mg-format", "torch_dist"], ["--to-type", "hf"]]
)
def test_failure_on_the_way_leaves_nothing(convert, folders, tmp_path, monkeypatch, words):
    plain = HuggingFaceWeights.read

    def failing(self, tensor, *where):
        if tensor.layer == 3:
            raise OSError(28, "No space left on device")
        return plain(self, tensor, *where)

    monkeypatch.setattr(HuggingFaceWeights, "read", failing)
    code, printed = convert("--from", folders["qwen2"], "--to", tmp_path / "new", *words)
    assert code == 1 and "No space left on device" in printed
    assert not list(tmp_path.iterdir())
