"""The reward model's values against transformers and plain PyTorch, on every layout, and the folders
and checkpoints that it is loaded from."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import make_model
from support.multiproc import DEVICE, run_ranks
from support.patience import LONG
from support.reward_models import (
    STEP,
    make_classifier,
    make_texts,
    make_two_layers,
    plain_probabilities,
    plain_values,
)

from r1zero.algo.packing import pack
from r1zero.distributed.groups import World
from r1zero.distributed.launch import Launch
from r1zero.distributed.placement import RoleSize, place
from r1zero.errors import BadInput
from r1zero.models.params import EMBEDDING, OUTPUT_LAYER, param_table
from r1zero.models.value_head import read_reward_config
from r1zero.policy.megatron import RoleModel
from r1zero.policy.reward_model import RewardModel, _samples
from r1zero.weights.open import open_weights
from r1zero.weights.save_megatron import LegacyLayout, save_dist, save_legacy

TOLERANCE = 1e-5  # fp32 sums in another order; values here have a spread of about 1

CLASSIFIERS = ["qwen2", "qwen2_tied", "qwen3", "llama", "mistral"]
OUTCOME = [*CLASSIFIERS, "two_layers"]
PROCESS = "process"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of all reward models, each by its name, and the models themselves."""
    folder = tmp_path_factory.mktemp("models")
    made = {family: make_classifier(family, folder / family) for family in CLASSIFIERS}
    made["two_layers"] = make_two_layers(folder / "two_layers", outputs=1)
    made[PROCESS] = make_two_layers(folder / PROCESS, outputs=2)
    return folder, made


def reward_grid(rank, size, store, role_size):
    """A role that does not learn, on all ranks."""
    sizes = {"train": RoleSize(size), "rollout": RoleSize(size), "ref": role_size}
    launch = Launch("single", rank, size, 0, (0,) * size, "", 0)
    world = World(launch, place(sizes, colocate=True), DEVICE, timedelta(seconds=LONG), store)
    return world.ref


def loaded(grid, load, folder=None, sequence_parallel=False, limits=(5, None)):
    """The reward model of the config.json in a folder, with the weights at `load`, in fp32."""
    shape = read_reward_config(folder or load)
    model = RoleModel(shape, grid, DEVICE, torch.float32, 64, sequence_parallel, False, seed=1)
    assert not hasattr(model.module, "output_layer")
    assert OUTPUT_LAYER not in model.parameters(), "nothing may be allocated that is not used"
    model.load(str(load))
    return RewardModel(model, *limits)


def values_body(rank, size, store, folder, role_size, sequence_parallel, limits):
    """What this rank says of its replica's texts: values by model, and probabilities of steps."""
    grid = reward_grid(rank, size, store, role_size)
    found = {}
    for name in OUTCOME:
        model = loaded(grid, folder / name, None, sequence_parallel, limits)
        found[name] = model.values(make_texts()[grid.replica :: grid.span.dp])
    model = loaded(grid, folder / PROCESS, None, sequence_parallel, limits)
    texts = make_texts(steps=True)[grid.replica :: grid.span.dp]
    found[PROCESS] = model.step_probabilities(texts)
    return grid.replica, grid.span.dp, grid.is_last_stage, found


@pytest.mark.parametrize(
    ("role_size", "sequence_parallel", "limits"),
    [
        (RoleSize(1), False, (5, None)),
        (RoleSize(1), False, (1, None)),
        (RoleSize(2, tp=2), False, (5, 60)),
        (RoleSize(2, tp=2), True, (5, 60)),
        (RoleSize(2, pp=2), False, (5, None)),
        (RoleSize(2), False, (5, 60)),
        (RoleSize(4, tp=2, pp=2), True, (5, 60)),
        (RoleSize(4), False, (5, 60)),
    ],
    ids=["1", "alone", "TP2", "TP2 SP", "PP2", "DP2", "TP2 PP2 SP", "DP4"],
)
def test_values_equal_those_of_transformers(models, role_size, sequence_parallel, limits):
    folder, made = models
    expected = {name: plain_values(made[name], make_texts()) for name in OUTCOME}
    assert min(np.std(values) for values in expected.values()) > 0.1
    expected[PROCESS] = plain_probabilities(made[PROCESS], make_texts(steps=True))
    assert np.std(np.concatenate(expected[PROCESS])) > 0.02
    ranks = run_ranks(values_body, role_size.ranks, folder, role_size, sequence_parallel, limits)
    for replica, replicas, is_last_stage, found in ranks:
        own = slice(replica, None, replicas)
        if not is_last_stage:
            assert not any(found.values())
            continue
        for name in OUTCOME:
            np.testing.assert_allclose(found[name], expected[name][own], 0, TOLERANCE, err_msg=name)
        for steps, of_text in zip(found[PROCESS], expected[PROCESS][own], strict=True):
            np.testing.assert_allclose(steps, of_text, rtol=0, atol=TOLERANCE)


def test_a_prompt_is_read_once_for_all_its_responses():
    texts = make_texts()
    batch = pack(_samples(texts), torch.device("cpu"))
    prompts = sum(len(text.prompt) for text in texts[::4])
    assert len(batch.tokens) == prompts + sum(len(text.response) for text in texts)


def experts_body(rank, size, store, folder):
    """Three texts of the first replica and none of the second, whose experts all have tokens of."""
    grid = reward_grid(rank, size, store, RoleSize(size, ep=2))
    model = loaded(grid, folder, limits=(1, None))
    return model.values(make_texts()[:3] if grid.replica == 0 else [])


def test_replicas_that_share_experts_need_not_have_as_many_texts(tmp_path):
    model = make_classifier("qwen3_moe", tmp_path)
    found, nothing = run_ranks(experts_body, 2, tmp_path)
    expected = plain_values(model, make_texts()[:3])
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert nothing == []


def bf16_body(rank, size, store, folder):
    grid = reward_grid(rank, size, store, RoleSize(1))
    shape = read_reward_config(folder)
    model = RoleModel(shape, grid, DEVICE, torch.bfloat16, 64, False, False, seed=1)
    model.load(str(folder))
    return {name: value.dtype for name, value in model.parameters().items()}, RewardModel(
        model, 4, None
    ).values(make_texts())


def test_the_head_of_a_model_in_bf16_is_in_fp32(models):
    folder, made = models
    [(dtypes, values)] = run_ranks(bf16_body, 1, folder / "qwen2")
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {"rm_head.weight", "rm_head.bias"}
    expected = plain_values(made["qwen2"], make_texts())
    np.testing.assert_allclose(values, expected, rtol=0, atol=0.1)
    assert any(value != torch.tensor(value).bfloat16().item() for value in values)


# -- Megatron's checkpoints ------------------------------------------------------------------------


def checkpoint_body(rank, size, store, loads, folder):
    """Values on the last stage by each of several checkpoints, at TP 2."""
    grid = reward_grid(rank, size, store, RoleSize(size, tp=2))
    return [loaded(grid, load, folder).values(make_texts()) for load in loads]


def saved(folder, source, layout=None):
    """A Megatron checkpoint of the reward model in `source`: legacy of a layout, or torch_dist."""
    weights = open_weights(source, read_reward_config(source))
    if layout is None:
        save_dist(folder, weights, torch.float32)
    else:
        save_legacy(folder, weights, torch.float32, layout)
    return folder


def edit_ranks(folder, edit):
    """Change what each TP rank's file of the last stage holds: edit(number, state)."""
    for number in range(2):
        path = folder / "iter_0000001" / f"mp_rank_{number:02d}_001" / "model_optim_rng.pt"
        content = torch.load(path, weights_only=False)
        edit(number, content["model"])
        torch.save(content, path)


def test_megatron_checkpoints_give_the_same_values(models, tmp_path):
    """Legacy files cut the head by columns, as MindSpeed-LLM does; whole ones are read as well."""
    folder, made = models
    layout = LegacyLayout(tp=2, layers=(2, 2))
    legacy = saved(tmp_path / "legacy", folder / "qwen2", layout)
    whole = load_file(folder / "qwen2" / "model.safetensors")["score.weight"]
    seen = []

    def add_bias(number, state):
        assert torch.equal(state["rm_head.weight"], whole[:, 32 * number : 32 * (number + 1)])
        assert state["rm_head.weight"].dtype == torch.float32
        assert state["rm_head.bias"].tolist() == [0.0], "Megatron's reward models ask for one"
        state["rm_head.bias"] = torch.tensor([0.5])
        state["output_layer.weight"] = torch.zeros(256, 64)  # that of the policy it was
        seen.append(number)

    def leave_whole(number, state):
        state["rm_head.weight"] = whole
        del state["rm_head.bias"]

    biased = tmp_path / "biased"
    shutil.copytree(legacy, biased)
    edit_ranks(biased, add_bias)
    uncut = tmp_path / "uncut"
    shutil.copytree(legacy, uncut)
    edit_ranks(uncut, leave_whole)
    dist = saved(tmp_path / "dist", folder / "qwen2")
    loads = [legacy, uncut, dist, biased]
    found, again = run_ranks(checkpoint_body, 2, loads, folder / "qwen2")
    expected = np.array(plain_values(made["qwen2"], make_texts()))
    assert seen == [0, 1] and found == again
    for values in found[:3]:
        np.testing.assert_allclose(values, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found[3], expected + 0.5, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "layout", [LegacyLayout(tp=2, layers=(2, 2)), None], ids=["legacy", "dist"]
)
def test_a_head_of_two_layers_survives_a_checkpoint(models, tmp_path, layout):
    source = models[0] / PROCESS
    shape = read_reward_config(source)
    before = open_weights(source, shape)
    after = open_weights(saved(tmp_path / "saved", source, layout), shape)
    names = [spec.name for spec in param_table(shape) if spec.name.startswith("rm_head")]
    assert names == [f"rm_head.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
    for spec in param_table(shape):
        assert torch.equal(before.read(spec), after.read(spec)), spec.name


def test_a_checkpoint_without_a_head_is_refused(models, tmp_path):
    source = models[0] / "qwen2"
    legacy = saved(tmp_path / "legacy", source, LegacyLayout(tp=2, layers=(2, 2)))
    edit_ranks(legacy, lambda _, state: state.pop("rm_head.weight"))
    with pytest.raises(BadInput, match=r"rm_head\.weight is missing"):
        open_weights(legacy, read_reward_config(source))


# -- folders ---------------------------------------------------------------------------------------


@pytest.fixture
def copy(models, tmp_path):
    """Copy a reward model for a test to change, and edit its config.json."""

    def copied(name, **keys):
        folder = shutil.copytree(models[0] / name, tmp_path / name)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
        return folder

    return copied


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def refusal(folder):
    """The one sentence that a folder is refused with."""
    with pytest.raises(BadInput) as refused:
        open_weights(folder, read_reward_config(folder))
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


def test_a_policy_is_no_reward_model(tmp_path):
    make_model("qwen2", tmp_path)
    told = refusal(tmp_path)
    assert told.startswith(
        f"{tmp_path}/config.json: architecture Qwen2ForCausalLM has no value head"
    )
    assert "name the folder of one" in told


def test_a_classifier_is_no_reward_model(copy):
    names = {"id2label": {"0": "bad", "1": "good"}}
    assert "config.json: num_labels: 2 is not supported" in refusal(copy("qwen2", **names))
    assert "config.json: num_labels: 2 is" in refusal(copy("qwen3", id2label=None))
    assert "architecture 'GPT2ForCausalLM' is not supported" in refusal(
        copy("llama", architectures=["GPT2ForSequenceClassification"])
    )


@pytest.mark.parametrize(
    ("name", "head"), [("qwen2", "score.weight"), ("two_layers", "score.2.bias")]
)
def test_a_head_is_never_made_up(copy, name, head):
    folder = copy(name)
    edit_tensors(folder, lambda tensors: tensors.pop(head))
    assert refusal(folder).endswith(f"do not fit config.json: {head} is missing")


def test_an_output_layer_that_is_there_is_left_alone(copy):
    folder = copy("qwen2_tied")
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(512, 64)}))
    shape = read_reward_config(folder)
    weights = open_weights(folder, shape)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(weights.read(param_table(shape)[0]), embedding)
    assert param_table(shape)[0].name == EMBEDDING
    assert OUTPUT_LAYER not in [spec.name for spec in param_table(shape)]


def test_openrlhfs_models_tell_their_mean_and_spread(copy):
    keys = {"architectures": ["RewardModel"], "mean": -1.5, "std": 2}
    head = read_reward_config(copy("llama", **keys)).value_head
    assert (head.layers, head.outputs, head.mean, head.std) == (1, 1, -1.5, 2.0)
    assert "std: 0 must be a number above 0" in refusal(copy("qwen2", std=0))
    assert 'mean: "high" must be a number' in refusal(copy("qwen3", mean="high"))
    told = refusal(copy("mistral", architectures=["RewardModel"], value_head_prefix="value"))
    assert "value_head_prefix: value is not supported; only score is" in told


def test_the_step_token_is_the_tokenizers(copy):
    folder = copy(PROCESS)
    assert read_reward_config(folder).value_head.step_token == STEP
    (folder / "tokenizer.json").unlink()
    assert "has no place for <extra_0>, the token 151651 that ends a step" in refusal(folder)
    (folder / "added_tokens.json").write_text('{"<extra_0>": 499}')
    assert read_reward_config(folder).value_head.step_token == 499
    (folder / "added_tokens.json").unlink()
    keys = json.loads((folder / "config.json").read_text()) | {"vocab_size": 152064}
    (folder / "config.json").write_text(json.dumps(keys))
    assert read_reward_config(folder).value_head.step_token == 151651
