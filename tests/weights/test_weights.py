"""The names table and the conversion of Hugging Face folders, against transformers and a mapping by
hand."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.params import (
    FIRST,
    WHOLE,
    ShardIndex,
    Shards,
    Stages,
    local_shape,
    local_view,
    merge,
    name_on_stage,
    param_table,
    shard,
    stage_of,
    stage_params,
)
from r1zero.weights import huggingface
from r1zero.weights.open import open_weights
from r1zero.weights.save_huggingface import save_hf

TWO = Stages.even(4, 2)
SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=64,
    max_position_embeddings=64,
)
MODELS = {
    "qwen2_tied": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2_untied": transformers.Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None),
    "olmo2": transformers.Olmo2Config(**SIZES, pad_token_id=None),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder a model, every parameter random: transformers starts norms at one and biases at
    zero."""
    made = {}
    for name, config in MODELS.items():
        torch.manual_seed(len(made))
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for param in model.parameters():
                param.normal_()
        made[name] = tmp_path_factory.mktemp("models") / name
        model.to(torch.bfloat16).save_pretrained(made[name])
        (made[name] / "tokenizer.json").write_text("{}")
    return made


@pytest.fixture
def broken(folders, tmp_path):
    """A copy of the untied model for a test to damage."""
    return shutil.copytree(folders["qwen2_untied"], tmp_path / "broken")


def state_of(folder):
    """All tensors of a folder, read by safetensors' own loader."""
    return {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def rewrite(folder, change):
    """Apply `change` to the state dict of a single-file folder."""
    state = state_of(folder)
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def by_hand(folder, shape):
    """The whole model in Megatron's layout for TP 1, written out row by row without the table."""
    hf, group = state_of(folder), shape.num_heads // shape.num_kv_heads
    made = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    if not shape.tie_word_embeddings:
        made["output_layer.weight"] = hf["lm_head.weight"]
    for n in range(shape.num_layers):
        ours, theirs = f"decoder.layers.{n}.", f"model.layers.{n}."
        after_attention = hf[theirs + "post_attention_layernorm.weight"]
        if shape.family == "olmo2":
            made[ours + "self_attention.linear_proj.post_layernorm.weight"] = after_attention
            after_mlp = hf[theirs + "post_feedforward_layernorm.weight"]
            made[ours + "mlp.linear_fc2.post_layernorm.weight"] = after_mlp
        else:
            made[ours + "input_layernorm.weight"] = hf[theirs + "input_layernorm.weight"]
            made[ours + "pre_mlp_layernorm.weight"] = after_attention
        made[ours + "self_attention.linear_proj.weight"] = hf[theirs + "self_attn.o_proj.weight"]
        made[ours + "mlp.linear_fc2.weight"] = hf[theirs + "mlp.down_proj.weight"]
        made[ours + "mlp.linear_fc1.weight"] = torch.cat(
            [hf[theirs + "mlp.gate_proj.weight"], hf[theirs + "mlp.up_proj.weight"]]
        )
        for kind in ["weight"] + ["bias"] * shape.qkv_bias:
            heads = {
                part: hf[f"{theirs}self_attn.{part}_proj.{kind}"].split(shape.head_dim)
                for part in "qkv"
            }
            rows = []
            for kv in range(shape.num_kv_heads):
                rows += [*heads["q"][kv * group : (kv + 1) * group], heads["k"][kv], heads["v"][kv]]
            made[f"{ours}self_attention.linear_qkv.{kind}"] = torch.cat(rows)
        for part in "qk" if shape.qk_norm else "":
            name = f"{ours}self_attention.{part}_layernorm.weight"
            made[name] = hf[f"{theirs}self_attn.{part}_norm.weight"]
    return made


def named(stream):
    return {tensor.name: part for tensor, part in stream}


def whole(folder, shape):
    """The table's stream for TP 1."""
    return open_weights(folder, shape).stream(param_table(shape), FIRST, WHOLE, torch.bfloat16)


# The table.


@pytest.mark.parametrize("model", MODELS)
def test_table_names_every_parameter_of_transformers_once(model, folders):
    shape = ModelConfig.from_folder(folders[model])
    table = param_table(shape)
    sources = [name for tensor in table for name in tensor.hf]
    theirs = transformers.AutoModelForCausalLM.from_config(MODELS[model])
    reference = {name: tuple(param.shape) for name, param in theirs.named_parameters()}
    sizes = [size for tensor in table for size in tensor.hf_shape]
    assert dict(zip(sources, sizes, strict=True)) == reference
    assert len(sources) == len(reference)
    assert sum(torch.Size(tensor.view).numel() for tensor in table) == shape.num_parameters


def test_stages_hold_all_tensors_and_the_last_a_copy_of_a_tied_embedding(folders):
    shape = ModelConfig.from_folder(folders["qwen2_tied"])
    first, second = (stage_params(shape, stage, TWO) for stage in (0, 1))
    assert first + second[:-1] == param_table(shape)
    assert second[-1].name == "output_layer.weight" and second[-1].hf == (
        "model.embed_tokens.weight",
    )
    assert stage_params(shape, 0, Stages.even(4, 1)) == param_table(shape)
    assert {tensor.layer for tensor in first} == {None, 0, 1}
    untied = ModelConfig.from_folder(folders["qwen2_untied"])
    assert stage_params(untied, 0, TWO) + stage_params(untied, 1, TWO) == param_table(untied)


def test_layers_are_numbered_from_the_first_of_the_stage(folders):
    shape = ModelConfig.from_folder(folders["llama"])
    names = [name_on_stage(tensor, TWO) for tensor in stage_params(shape, 1, TWO)]
    assert names[0] == "decoder.layers.0.input_layernorm.weight"
    assert names[-3] == "decoder.layers.1.mlp.linear_fc2.weight"
    assert names[-2:] == ["decoder.final_layernorm.weight", "output_layer.weight"]


def test_layers_that_cannot_be_spread_are_refused(folders):
    table = param_table(ModelConfig.from_folder(folders["llama"]))
    with pytest.raises(BadInput, match="4 cannot be spread evenly over 3"):
        stage_of(table[0], Stages.even(4, 3))


def test_writing_to_a_local_view_writes_the_parameter(folders):
    table = {
        tensor.name: tensor for tensor in param_table(ModelConfig.from_folder(folders["llama"]))
    }
    fc1 = table["decoder.layers.0.mlp.linear_fc1.weight"]
    param = torch.nn.Parameter(torch.zeros(local_shape(fc1, Shards(2))))
    assert param.shape == (48, 32)
    local_view(fc1, param, Shards(2))[1, 3:5] = 7.0  # up rows 3 and 4
    assert param[:, 0].nonzero().flatten().tolist() == [24 + 3, 24 + 4]


def test_tp_that_does_not_divide_is_refused(folders):
    with pytest.raises(BadInput, match="word_embeddings.weight has 64 .* tensor parallel size 3"):
        local_shape(param_table(ModelConfig.from_folder(folders["llama"]))[0], Shards(3))


# Loading.


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tp", [1, 2, 4])  # 4 is more than there are key-value heads
def test_loaded_shards_merge_into_the_mapping_made_by_hand(model, tp, folders):
    folder = folders[model]
    shape = ModelConfig.from_folder(folder)
    weights = open_weights(folder, shape)
    ranks = [
        dict(weights.stream(param_table(shape), ShardIndex(rank), Shards(tp), torch.bfloat16))
        for rank in range(tp)
    ]
    reference = by_hand(folder, shape)
    assert {tensor.name for tensor in param_table(shape)} == set(reference)
    for tensor in param_table(shape):
        shards = [rank[tensor] for rank in ranks]
        assert all(
            part.shape == local_shape(tensor, Shards(tp)) and part.is_contiguous()
            for part in shards
        )
        assert torch.equal(merge(tensor, shards), reference[tensor.name]), tensor.name
        for rank, part in enumerate(shards):
            assert torch.equal(
                shard(tensor, reference[tensor.name], ShardIndex(rank), Shards(tp)), part
            ), tensor.name


def test_each_rank_holds_its_gate_rows_above_its_up_rows(folders):
    folder = folders["llama"]
    shape, state = ModelConfig.from_folder(folder), state_of(folder)
    gate, up = (state[f"model.layers.3.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    for rank in range(2):
        loaded = named(
            open_weights(folder, shape).stream(
                param_table(shape), ShardIndex(rank), Shards(2), torch.float32
            )
        )
        expected = torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]]).float()
        assert torch.equal(loaded["decoder.layers.3.mlp.linear_fc1.weight"], expected)


def test_attention_of_tp_2_is_cut_between_groups(folders):
    folder = folders["qwen2_untied"]
    shape, state = ModelConfig.from_folder(folder), state_of(folder)
    q, k, v = (state[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv")
    for rank in range(2):
        loaded = named(
            open_weights(folder, shape).stream(
                param_table(shape), ShardIndex(rank), Shards(2), torch.bfloat16
            )
        )
        # one key-value group a rank
        expected = torch.cat([part.chunk(2)[rank] for part in (q, k, v)])
        assert torch.equal(loaded["decoder.layers.0.self_attention.linear_qkv.weight"], expected)
        columns = state["model.layers.0.self_attn.o_proj.weight"].chunk(2, dim=1)[rank]
        assert torch.equal(loaded["decoder.layers.0.self_attention.linear_proj.weight"], columns)


def test_only_the_shards_own_elements_are_read(folders, monkeypatch):
    read = []

    class Slice:
        def __init__(self, source):
            self.source, self.get_shape, self.get_dtype = source, source.get_shape, source.get_dtype

        def __getitem__(self, key):
            read.append(self.source[key].numel())
            return self.source[key]

    class Recorder:
        def __init__(self, path, framework):
            self.file = safe_open(path, framework=framework)
            self.keys = self.file.keys

        def get_slice(self, name):
            return Slice(self.file.get_slice(name))

    monkeypatch.setattr(huggingface, "safe_open", Recorder)
    shape = ModelConfig.from_folder(folders["qwen2_untied"])
    wanted = stage_params(shape, 1, TWO)
    stream = open_weights(folders["qwen2_untied"], shape).stream(
        wanted, ShardIndex(1), Shards(2), torch.bfloat16
    )
    assert not read, "opening the folder reads headers only"
    count = 0
    for _, part in stream:
        count += 1
        assert sum(read) == part.numel(), "a tensor is read when its turn comes, and no more of it"
        read.clear()
    assert count == len(wanted)


def test_last_stage_of_a_tied_model_loads_its_copy_from_the_embedding(folders):
    folder = folders["qwen3"]
    shape = ModelConfig.from_folder(folder)
    *_, (tensor, part) = open_weights(folder, shape).stream(
        stage_params(shape, 1, TWO), ShardIndex(1), Shards(2), torch.bfloat16
    )
    assert tensor.name == "output_layer.weight"
    assert torch.equal(part, state_of(folder)["model.embed_tokens.weight"][32:])


def test_sharded_folder_loads_like_a_single_file(folders, tmp_path):
    folder = folders["llama"]
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(
        tmp_path, max_shard_size="20KB"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    shape = ModelConfig.from_folder(folder)
    for (tensor, one), (_, other) in zip(whole(folder, shape), whole(tmp_path, shape), strict=True):
        assert torch.equal(one, other), tensor.name


# Saving.


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_round_trip_is_bit_equal_and_transformers_sees_the_same_model(
    model, shard_bytes, folders, tmp_path
):
    folder, saved = folders[model], tmp_path / "saved"
    shape = ModelConfig.from_folder(folder)
    save_hf(saved, shape, whole(folder, shape), folder, "bfloat16", shard_bytes)
    before, after = state_of(folder), state_of(saved)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    files = list(saved.glob("*.safetensors"))
    assert (
        (saved / "model.safetensors.index.json").exists()
        == (shard_bytes == 30_000)
        == (len(files) > 1)
    )
    sizes = [sum(part.nbytes for part in load_file(file).values()) for file in sorted(files)]
    assert max(sizes) <= shard_bytes
    assert len(sizes) <= 1 + 2 * sum(sizes) // shard_bytes, "files are at least half full"
    assert (saved / "tokenizer.json").read_text() == "{}"
    assert (saved / "generation_config.json").exists()
    tokens = torch.arange(12).view(1, 12)
    logits = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")(tokens).logits
        for path in (folder, saved)
    ]
    assert logits[0].dtype == torch.bfloat16 and torch.equal(*logits)


def test_saved_dtype_is_the_one_named_and_config_says_so(folders, tmp_path):
    folder = folders["qwen2_tied"]
    shape = ModelConfig.from_folder(folder)
    save_hf(tmp_path / "saved", shape, whole(folder, shape), folder, "float32")
    assert {part.dtype for part in state_of(tmp_path / "saved").values()} == {torch.float32}
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"


def test_stream_may_reuse_its_buffer(folders, tmp_path):
    folder = folders["llama"]
    shape = ModelConfig.from_folder(folder)
    buffer = torch.empty(10**4, dtype=torch.bfloat16)

    def reusing():
        for tensor, full in whole(folder, shape):
            yield tensor, buffer[: full.numel()].view(full.shape).copy_(full)

    save_hf(tmp_path / "saved", shape, reusing(), folder, "bfloat16")
    before, after = state_of(folder), state_of(tmp_path / "saved")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_failed_save_leaves_the_older_model_and_nothing_else(folders, tmp_path):
    folder, saved = folders["llama"], tmp_path / "saved"
    shape = ModelConfig.from_folder(folder)
    save_hf(saved, shape, whole(folder, shape), folder, "bfloat16")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def failing():
        yield from list(whole(folder, shape))[:5]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_hf(saved, shape, failing(), folder, "bfloat16", shard_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    save_hf(saved, shape, whole(folder, shape), folder, "float32")
    assert {part.dtype for part in state_of(saved).values()} == {torch.float32}
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_stream_that_lacks_or_repeats_a_tensor_is_refused(folders, tmp_path):
    folder = folders["llama"]
    shape = ModelConfig.from_folder(folder)
    *most, last = whole(folder, shape)
    with pytest.raises(AssertionError, match="without .*output_layer.weight"):
        save_hf(tmp_path / "saved", shape, most, folder, "bfloat16")
    with pytest.raises(AssertionError, match="came twice"):
        save_hf(tmp_path / "saved", shape, [*most, last, last], folder, "bfloat16")
    assert not list(tmp_path.iterdir())


def test_saving_over_the_source_or_a_folder_of_something_else_is_refused(folders, tmp_path):
    folder = folders["llama"]
    shape = ModelConfig.from_folder(folder)
    (tmp_path / "thesis.tex").write_text("all of it")
    for target in (folder, tmp_path):
        with pytest.raises(BadInput, match="name another one"):
            save_hf(target, shape, whole(folder, shape), folder, "bfloat16")
    assert (tmp_path / "thesis.tex").exists() and (folder / "model.safetensors").exists()


# Folders that are not what they should be.


def refusal(folder):
    """What is said about a folder before anything is read from it."""
    with pytest.raises(BadInput) as refused:
        open_weights(folder, ModelConfig.from_folder(folder))
    return str(refused.value)


def test_sound_folders_pass_the_check(folders):
    for folder in folders.values():
        open_weights(folder, ModelConfig.from_folder(folder))


def test_missing_misshaped_mistyped_and_unexpected_tensors_are_all_listed(broken):
    def change(state):
        del state["lm_head.weight"]
        state["model.norm.weight"] = state["model.norm.weight"][:8].clone()
        state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.int8)
        state["model.layers.4.mlp.up_proj.weight"] = torch.zeros(48, 32)

    rewrite(broken, change)
    message = refusal(broken)
    for part in (
        "lm_head.weight is missing",
        "model.norm.weight has the shape (8,) instead of (32,)",
        "model.layers.1.mlp.up_proj.weight has the type I8",
        "model.layers.4.mlp.up_proj.weight is unexpected",
    ):
        assert part in message


def test_long_list_of_problems_is_shortened(broken):
    rewrite(broken, lambda state: [state.pop(name) for name in list(state) if "mlp" in name])
    assert "and 2 more" in refusal(broken)  # 4 layers x 3 matrices


def test_rotary_buffers_of_old_checkpoints_are_ignored(broken):
    rewrite(
        broken,
        lambda state: state.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
        ),
    )
    open_weights(broken, ModelConfig.from_folder(broken))


def test_output_layer_beside_a_tied_embedding_must_be_equal(folders, tmp_path):
    folder = shutil.copytree(folders["qwen2_tied"], tmp_path / "model")
    shape = ModelConfig.from_folder(folder)
    head = state_of(folder)["model.embed_tokens.weight"].clone()
    rewrite(folder, lambda state: state.update({"lm_head.weight": head}))
    assert len(list(whole(folder, shape))) == len(param_table(shape))
    rewrite(folder, lambda state: state["lm_head.weight"][40].neg_())
    weights = open_weights(folder, shape)
    # the row is not in this rank's shard
    list(weights.stream(param_table(shape), FIRST, Shards(2), torch.bfloat16))
    with pytest.raises(BadInput, match="tie_word_embeddings"):
        list(weights.stream(param_table(shape), ShardIndex(1), Shards(2), torch.bfloat16))


def test_truncated_file_is_refused(broken):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "but its header describes" in refusal(broken)


def test_garbage_is_refused(broken):
    (broken / "model.safetensors").write_bytes(b"\x80\x02torch.save wrote this" * 9)
    assert "has no safetensors header" in refusal(broken)
    (broken / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    assert "is a pointer of Git LFS" in refusal(broken)
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors").symlink_to("../blobs/purged")
    assert "is a link to ../blobs/purged, which is not there" in refusal(broken)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value, broken):
    rewrite(broken, lambda state: state["model.layers.2.mlp.up_proj.weight"][7].fill_(value))
    shape = ModelConfig.from_folder(broken)
    with pytest.raises(BadInput, match="decoder.layers.2.mlp.linear_fc1.weight in .* NaN or inf"):
        list(whole(broken, shape))


def test_values_that_a_smaller_type_cannot_hold_are_refused(broken):
    def change(state):
        state["model.norm.weight"] = state["model.norm.weight"].double().fill_(1e300)

    rewrite(broken, change)
    with pytest.raises(BadInput, match="final_layernorm.weight in .* infinite in bfloat16"):
        list(whole(broken, ModelConfig.from_folder(broken)))


def test_folder_without_weights_is_refused(broken):
    (broken / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(broken)


def test_index_naming_a_missing_file_is_refused(broken):
    (broken / "model.safetensors").rename(broken / "part.safetensors")
    index = broken / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors", "b": "gone.safetensors"}}))
    assert "gone.safetensors cannot be read" in refusal(broken)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": [1]}}']
)
def test_broken_index_is_refused(text, broken):
    (broken / "model.safetensors").rename(broken / "part.safetensors")
    (broken / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json is not an index" in refusal(broken)
