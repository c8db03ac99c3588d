"""Reading Megatron checkpoints: those of megatron-core give its logits here, damage gives a
sentence."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.megatron_checkpoints import TOKENS, write_body
from support.multiproc import DEVICE, run_ranks
from support.worlds import make_world
from torch.distributed.checkpoint.metadata import MetadataIndex

from r1zero.algo.packing import TrainSample, pack
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.params import FIRST, WHOLE, param_table
from r1zero.policy.megatron import RoleModel
from r1zero.types import Prompt, Sample
from r1zero.weights.detect import detect
from r1zero.weights.open import open_weights


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """For "untied" and "tied": (folder with legacy and dist checkpoints, the writer's logits [T,
    V])."""
    made = {}
    for name in ("untied", "tied"):
        folder = tmp_path_factory.mktemp(name)
        ranks = run_ranks(write_body, 4, str(folder), name == "tied")
        [logits] = [part for part in ranks if part is not None]
        made[name] = folder, logits[0]
    return made


def logits_body(rank, size, store, folder):
    """This rank's columns of the logits by kind of checkpoint."""
    world, found = make_world(rank, size, store, (size, 1)), {}
    tokens = TOKENS[0].numpy().astype(np.int32)
    item = TrainSample(
        0, 0, Prompt(0, "", tokens, ""), Sample(tokens[:1], np.zeros(1, np.float32), False, 0)
    )
    batch = pack([item], torch.device("cpu"))
    for kind in ("legacy", "dist"):
        shape = ModelConfig.from_folder(folder / kind)
        model = RoleModel(shape, world.train, DEVICE, torch.float32, 64, False, False, seed=1)
        model.load(str(folder / kind))
        with torch.no_grad(), model.active():
            hidden = model.hidden(batch)
        found[kind] = (hidden[:, 0] @ model.module.head_weight().t())[: TOKENS.shape[1]]
    return found


@pytest.mark.parametrize("model", ["untied", "tied"])
@pytest.mark.parametrize("tp", [1, 4])
def test_checkpoints_of_megatron_core_give_its_logits(written, model, tp):
    folder, expected = written[model]
    ranks = run_ranks(logits_body, tp, folder)
    for kind in ("legacy", "dist"):
        found = torch.cat([part[kind] for part in ranks], dim=1)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


# What else there is in the wild, and what is damaged.

ITERATION, TRACKER = "iter_0000007", "latest_checkpointed_iteration.txt"


@pytest.fixture
def copy(written, tmp_path):
    """A copy of both checkpoints of the untied model for a test to change."""
    return shutil.copytree(written["untied"][0], tmp_path / "copy")


def whole(path):
    """All tensors of a checkpoint by name; its folder, or the one above the iteration's, has
    config.json."""
    folder = path if (path / "config.json").is_file() else path.parent
    shape = ModelConfig.from_folder(folder)
    stream = open_weights(path, shape).stream(param_table(shape), FIRST, WHOLE, torch.float32)
    # what is mapped would change with the file
    return {tensor.name: part.clone() for tensor, part in stream}


def refusal(path):
    with pytest.raises(BadInput) as refused:
        whole(path)
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


def file_of(folder, rank):
    return folder / ITERATION / f"mp_rank_{rank}" / "model_optim_rng.pt"


def change(folder, rank, edit):
    """Apply `edit` to the content of a legacy file."""
    path = file_of(folder / "legacy", rank)
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)


def config(folder, **keys):
    for kind in ("legacy", "dist"):
        path = folder / kind / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_both_kinds_hold_the_same_and_say_what_they_are(copy):
    one, two = whole(copy / "legacy"), whole(copy / "dist")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert str(detect(copy / "legacy")) == (
        f"Megatron legacy checkpoint {copy / 'legacy' / ITERATION}, iteration 7, saved at TP2 PP2"
    )
    assert str(detect(copy / "dist")) == (
        f"Megatron torch_dist checkpoint {copy / 'dist' / ITERATION}, iteration 7"
    )


@pytest.mark.parametrize("kind", ["legacy", "dist"])
def test_released_weights_and_folders_of_an_iteration(copy, kind):
    expected = whole(copy / kind)
    assert all(
        torch.equal(part, expected[name]) for name, part in whole(copy / kind / ITERATION).items()
    )
    (copy / kind / ITERATION).rename(copy / kind / "release")
    (copy / kind / TRACKER).write_text("release\n")
    assert all(torch.equal(part, expected[name]) for name, part in whole(copy / kind).items())
    assert detect(copy / kind).iteration is None


def test_virtual_stages_names_of_fused_layers_and_uneven_stages(copy):
    """Four chunks of one layer on two stages: chunk 0 of stages 0 and 1, then chunk 1 of both."""
    expected = whole(copy / "legacy")
    for tp in (0, 1):
        paths = [file_of(copy / "legacy", f"0{tp}_00{pp}") for pp in (0, 1)]
        layers = {}
        for pp, path in enumerate(paths):
            for name, value in torch.load(path, weights_only=False)["model"].items():
                head, _, rest = name.partition("decoder.layers.")
                layer, _, tail = rest.partition(".")
                key = 2 * pp + int(layer) if rest and not head else -1 if pp == 0 else 4
                layers.setdefault(key, {})[tail if 0 <= key < 4 else name] = value
        fused = {
            "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
            "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
        }
        chunks = [
            {
                f"decoder.layers.0.{fused.get(tail, tail)}": value
                for tail, value in layers[n].items()
            }
            for n in range(4)
        ]
        chunks[0] |= layers[-1]
        chunks[3] |= layers[4]
        for pp, path in enumerate(paths):
            torch.save(
                {"checkpoint_version": 3.0, "model0": chunks[pp], "model1": chunks[pp + 2]}, path
            )
    found = whole(copy / "legacy")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_padded_vocabulary_is_cut(copy):
    expected = whole(copy / "legacy")
    config(copy, vocab_size=510)
    for kind in ("legacy", "dist"):
        found = whole(copy / kind)
        assert all(
            torch.equal(found[name], part[:510] if "embed" in name or "output" in name else part)
            for name, part in expected.items()
        )
    config(copy, vocab_size=513)
    for kind in ("legacy", "dist"):
        assert "embedding.word_embeddings.weight has the shape" in refusal(copy / kind)


def test_halves_of_the_mlp_may_be_stored_apart(copy):
    """As megatron-core writes them with `singleton_local_shards`."""
    path = copy / "dist" / ITERATION / ".metadata"
    content, key = pickle.loads(path.read_bytes()), "decoder.layers.mlp.linear_fc1.weight"
    expected, entry = whole(copy / "dist"), content.state_dict_metadata.pop(key)
    for half, end in ((0, "_w"), (1, "_v")):
        chunks = [chunk for chunk in entry.chunks if chunk.offsets[1] // 96 == half]
        for chunk in chunks:
            place = content.storage_data.pop(MetadataIndex(key, chunk.offsets))
            chunk.offsets = torch.Size((chunk.offsets[0], chunk.offsets[1] - 96 * half, 0))
            content.storage_data[MetadataIndex(key + end, chunk.offsets)] = place
        content.state_dict_metadata[key + end] = replace(
            entry, size=torch.Size((4, 96, 64)), chunks=chunks
        )
    path.write_bytes(pickle.dumps(content))
    found = whole(copy / "dist")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_missing_unexpected_and_misshaped_tensors_are_all_listed(copy):
    def edit(content):
        model = content["model"]
        del model["decoder.layers.1.mlp.linear_fc2.weight"]
        model["decoder.layers.0.mlp.linear_fc1.bias"] = torch.zeros(3)
        model["decoder.final_layernorm.weight"] = torch.zeros(3)
        model["decoder.layers.1.mlp.linear_fc1.weight"] = [1]
        model["decoder.layers.1.pre_mlp_layernorm.weight"] = torch.zeros(64, dtype=torch.int32)

    change(copy, "01_001", edit)
    message = refusal(copy / "legacy")
    for piece in (
        "decoder.layers.3.mlp.linear_fc2.weight is missing (in mp_rank_01)",
        "decoder.layers.3.mlp.linear_fc1.weight is missing",
        "decoder.layers.2.mlp.linear_fc1.bias is unexpected",
        "decoder.final_layernorm.weight has the shape (3,) instead of (64,)",
        "decoder.layers.3.pre_mlp_layernorm.weight has the type torch.int32",
    ):
        assert piece in message


@pytest.mark.parametrize("kind", ["legacy", "dist"])
@pytest.mark.parametrize(
    ("keys", "piece"),
    [
        (dict(num_hidden_layers=6), "num_layers 4 instead of 6"),
        (dict(hidden_size=32, head_dim=16), "hidden_size 64 instead of 32"),
        (dict(num_key_value_heads=1), "num_query_groups 2 instead of 1"),
        (dict(num_attention_heads=8, head_dim=8), "num_attention_heads 4 instead of 8"),
        (dict(intermediate_size=80), "mlp.linear_fc1.weight has the shape"),
        (dict(architectures=["LlamaForCausalLM"]), "add_qkv_bias True instead of False"),
    ],
)
def test_wrong_model_is_refused(copy, kind, keys, piece):
    config(copy, **keys)
    message = refusal(copy / kind)
    assert piece in message and str(copy / kind / ITERATION) in message


def test_model_without_arguments_is_told_by_its_tensors(copy):
    for rank in ("00_000", "00_001", "01_000", "01_001"):
        change(copy, rank, lambda content: content.pop("args"))
    whole(copy / "legacy")
    config(copy, num_hidden_layers=5)
    assert "decoder.layers.4.mlp.linear_fc2.weight is missing" in refusal(copy / "legacy")


def test_rotary_base_of_the_arguments_only_warns(copy, caplog):
    config(copy, rope_theta=1e6)
    whole(copy / "dist")
    assert "rotary_base 10000" in caplog.text and "1000000.0" in caplog.text


def write(text, *place):
    return lambda folder: folder.joinpath(*place).write_text(text)


def remove(*place):
    return lambda folder: shutil.rmtree(folder.joinpath(*place))


def cut(*place):
    """Take the end off a file."""
    return lambda folder: os.truncate(
        folder.joinpath(*place), folder.joinpath(*place).stat().st_size - 100
    )


def blank(*place):
    """Fill a file with zeros."""
    return lambda folder: folder.joinpath(*place).write_bytes(
        bytes(folder.joinpath(*place).stat().st_size)
    )


def save(content, rank):
    return lambda folder: torch.save(content, file_of(folder, rank))


SHARD = ITERATION, "mp_rank_01_001", "model_optim_rng.pt"
METADATA = ITERATION, "metadata.json"


@pytest.mark.parametrize(
    ("kind", "damage", "pieces"),
    [
        (
            "legacy",
            write("20", TRACKER),
            ["says 20", "iter_0000020 does not exist", "iter_0000007, which can be named instead"],
        ),
        ("dist", write("\0garbage", TRACKER), ["garbage", "release"]),
        ("dist", lambda folder: (folder / TRACKER).unlink(), ["no latest_checkpointed", ITERATION]),
        ("legacy", remove(ITERATION, "mp_rank_01_000"), ["iter_0000007 lacks", "mp_rank_01_000"]),
        (
            "legacy",
            lambda folder: [shutil.rmtree(path) for path in folder.glob("iter_*/mp_rank_01*")],
            ["was saved at TP2 PP2", "files of TP1 PP2"],
        ),
        (
            "legacy",
            lambda folder: (folder / ITERATION / "mp_rank_00_000").rename(
                folder / ITERATION / "mp_rank_00_000_000"
            ),
            ["was saved at TP2 PP2", "files of TP1 PP1"],
        ),
        ("legacy", cut(*SHARD), ["mp_rank_01_001", "copy"]),
        ("legacy", write("", *SHARD), ["mp_rank_01_001"]),
        ("legacy", save({"model": {"language_model": {}}}, "00_000"), ["before megatron-core"]),
        ("legacy", save([1], "00_000"), ["holds no model"]),
        (
            "legacy",
            save({"model0": {}, "model1": {}}, "01_001"),
            ["mp_rank_01_001", "of two checkpoints"],
        ),
        ("dist", cut(ITERATION, "__1_0.distcp"), ["__1_0.distcp has", "cut off"]),
        (
            "dist",
            lambda folder: (folder / ITERATION / "__2_0.distcp").unlink(),
            ["__2_0.distcp is missing"],
        ),
        ("dist", blank(ITERATION, "__0_0.distcp"), ["__0_0.distcp is damaged"]),
        ("dist", cut(ITERATION, ".metadata"), [".metadata cannot be read"]),
        ("dist", cut(ITERATION, "common.pt"), ["common.pt cannot be read"]),
        (
            "dist",
            lambda folder: (folder / ITERATION / ".metadata").write_bytes(pickle.dumps({})),
            ["no metadata"],
        ),
        ("dist", write('{"sharded_backend": "zarr"}', *METADATA), ["zarr", "torch_dist"]),
        ("dist", write("{", *METADATA), ["metadata.json"]),
        ("dist", remove(ITERATION), ["iter_0000007 does not exist"]),
    ],
)
def test_damage_is_told_in_one_sentence(copy, kind, damage, pieces):
    damage(copy / kind)
    message = refusal(copy / kind)
    for piece in pieces:
        assert piece in message


class Hostile:
    """Makes the file `witness` when unpickled."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return open, (str(self.witness), "w")


@pytest.mark.parametrize("place", ["args", "model", "common.pt", ".metadata", "__0_0.distcp"])
def test_hostile_pickles_are_not_run(copy, tmp_path, place):
    hostile, kind, folder = Hostile(tmp_path / "ran"), "dist", copy / "dist" / ITERATION
    if place in ("args", "model"):
        kind = "legacy"
        change(copy, "01_000", lambda content: content.update({place: {"x": hostile}}))
    elif place == "common.pt":
        torch.save({"args": hostile}, folder / place)
    elif place == ".metadata":
        (folder / place).write_bytes(pickle.dumps(hostile))
    else:  # as long as the file was, with the program where each tensor should start
        packed = io.BytesIO()
        torch.save(hostile, packed)
        content = pickle.loads((folder / ".metadata").read_bytes())
        (folder / place).write_bytes(
            packed.getvalue().ljust((folder / place).stat().st_size, b"\0")
        )
        for info in content.storage_data.values():
            if info.relative_path == place:
                info.offset, info.length = 0, len(packed.getvalue())
        (folder / ".metadata").write_bytes(pickle.dumps(content))
    message = refusal(copy / kind)
    assert not (tmp_path / "ran").exists()
    if place == "__0_0.distcp":
        assert "damaged" in message
    else:
        assert "io.open" in message and "nothing of it was run" in message
    with open(copy / "proof", "wb") as file:  # the program does run where pickles are obeyed
        pickle.dump(hostile, file)
    pickle.loads((copy / "proof").read_bytes()).close()
    assert (tmp_path / "ran").exists()
