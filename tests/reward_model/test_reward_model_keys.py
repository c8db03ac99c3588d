"""What a configuration says of a reward model, and what is refused before anything starts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file
from support.small_config import SHAPE, load, only, tokenizer_json, told, weights

from r1zero.config.schema import placement
from r1zero.data.sources import train_sources
from r1zero.errors import BadInput
from r1zero.preflight.found import look
from r1zero.preflight.memory import memory
from r1zero.preflight.resolve import load_config
from r1zero.preflight.reward_model import reward_model_cautions
from r1zero.reward_model.tokenizer import chat_template


@pytest.fixture
def judged(home):
    """The small configuration with a reward model on two ranks of its own."""
    folder = home / "judge"
    folder.mkdir()
    shape = SHAPE | {
        "architectures": ["Qwen2ForSequenceClassification"],
        "num_labels": 1,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "tokenizer.json").write_text(tokenizer_json())
    head = {"score.weight": weights()["model.norm.weight"][None]}
    save_file(weights() | head, folder / "model.safetensors")
    return ["resource_pool.reward=[2]", f"reward.load={folder}"]


def test_the_role_follows_ref_and_has_replicas_of_its_own(home, judged) -> None:
    cfg = load(home, *judged, "reward.tensor_model_parallel_size=2")
    placed = placement(cfg, cfg.world_size)
    assert list(placed.roles) == ["train", "rollout", "ref", "reward"]
    assert placed.roles["reward"].ranks == [4, 5] and placed.roles["reward"].tp == 2
    assert told(home, *judged) == []
    found = look(cfg)
    needed = memory(cfg, placed, found.actor.shape, found.reference_shape, found.reward_shape)
    assert 0 < needed["reward"].weights < needed["ref"].weights, (
        "cut in two, without an output layer"
    )


def test_without_ranks_there_is_none_and_its_keys_are_told_to_do_nothing(home, judged) -> None:
    cfg, warnings = load_config(str(home / "base.yaml"), [judged[1], "reward.weight=2"])
    assert "reward" not in placement(cfg, 4).roles and not cfg.has_reward_model
    [told_of] = [line for line in warnings if "so there is no reward model" in line]
    assert told_of.startswith("reward.load, reward.weight: accepted, no effect")
    assert not load(home, "resource_pool.reward=[0]").has_reward_model


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["reward.load=null"], "resource_pool.reward: [2] names ranks of a reward model"),
        (["reward.load=/nowhere"], "reward.load: /nowhere does not exist"),
        (["reward.tensor_model_parallel_size=4"], "reward.tensor_model_parallel_size: 4"),
        (["reward.pipeline_model_parallel_size=3"], "resource_pool.reward"),
        (["reward.normalize=fixed", "reward.std=1"], "reward.mean: null is no mean"),
        (["reward.normalize=fixed", "reward.mean=0", "reward.std=0"], "reward.std: 0"),
        (["reward.clip=-1"], "reward.clip: -1"),
        (["reward.prompt_type=none_such"], "reward.prompt_type: prompt template 'none_such'"),
        (["reward.prompt_type=tokenizer_template"], "asks for the chat template of the tokenizer"),
        (["reward.model=big"], "reward.model: big is not listed under defaults"),
        (["training.dataset_category=1,0"], "has 2 numbers for the 1 data sets"),
        (["training.dataset_category=2"], "must be 1 (rules) or 0 (model)"),
        (["training.map_keys.category=kind"], "kind"),
    ],
)
def test_what_cannot_be_is_told(home, judged, keys, sentence) -> None:
    assert sentence in "\n".join(told(home, *judged, *keys))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reward.verifier", "false"),
        ("training.dataset_category", "0"),
        ("training.map_keys.category", "kind"),
    ],
)
def test_what_needs_a_reward_model_is_refused_without_one(home, key, value) -> None:
    assert only([line for line in told(home, f"{key}={value}") if line.startswith(key)]).count(
        "name ranks for it, such as resource_pool.reward: [1]"
    )


def test_a_folder_without_a_head_or_of_a_causal_model_is_refused(home, judged) -> None:
    folder = home / "judge"
    save_file(weights(), folder / "model.safetensors")
    assert "score.weight is missing" in only(told(home, *judged))
    assert "has no value head" in only(told(home, *judged, f"reward.load={home / 'net'}"))


def test_another_tokenizer_needs_a_rendering_of_its_own(home, judged) -> None:
    (home / "judge" / "tokenizer.json").write_text(tokenizer_json("<|more|>", "<|much|>"))
    assert told(home, *judged) == [], "more tokens than the policy's are no matter"
    shutil.copy(home / "judge" / "tokenizer.json", home / "net" / "tokenizer.json")
    (home / "judge" / "tokenizer.json").write_text(tokenizer_json("<|much|>", "<|more|>"))
    assert "with other ids than the policy's" in only(told(home, *judged))
    assert told(home, *judged, "reward.prompt_type=plain") == []


def test_a_model_that_cannot_read_the_longest_responses_is_told_of(home, judged) -> None:
    config = home / "judge" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 64}))
    cfg = load(home, *judged)
    assert told(home, *judged) == []
    assert "reads at most 64 tokens" in only(reward_model_cautions(look(cfg)))


def test_data_sets_of_a_blend_have_categories(home, judged) -> None:
    path = home / "train.parquet"
    cfg = load(
        home, *judged, f"actor_rollout.data_path=1,{path},3,{path}", "training.dataset_category=1,0"
    )
    [source] = train_sources(cfg)
    assert [part.category for part in source.parts()] == [1, 0]
    cfg = load(
        home, *judged, f"actor_rollout.data_path=1,{path},3,{path}", "training.dataset_category=0"
    )
    assert [part.category for part in train_sources(cfg)[0].parts()] == [0, 0]
    named = f"actor_rollout.data_path={{a: {{path: {path}, category: 0}}, b: {{path: {path}}}}}"
    cfg = load(home, *judged, named, "training.dataset_category=1")
    assert [source.category for source in train_sources(cfg)] == [0, 1]


def test_a_column_says_the_category_of_each_row(home, judged) -> None:
    rows = {
        "question": ["1+1?"] * 5,
        "ground_truth_answer": ["2"] * 5,
        "kind": ["rules", "model", None, "1", " 0 "],
    }
    pq.write_table(pa.table(rows), home / "train.parquet")
    assert told(home, *judged, "training.map_keys.category=kind") == []
    from r1zero.data.problems import read_problems

    [source] = train_sources(load(home, *judged, "training.map_keys.category=kind"))
    problems = read_problems(source.path, source.layout).problems
    assert [problem.category for problem in problems] == [1, 0, None, 1, 0]
    rows["kind"][2] = "both"
    pq.write_table(pa.table(rows), home / "train.parquet")
    assert "'both', which is no category" in only(
        told(home, *judged, "training.map_keys.category=kind")
    )
    with pytest.raises(BadInput):
        read_problems(source.path, source.layout)


def test_the_reward_is_left_to_the_model_where_no_rule_is_named(home, judged) -> None:
    text = (home / "base.yaml").read_text()
    bare = text.replace(
        "algorithm: {verifier_function: [acc, format], verifier_weight: [0.5, 0.5]}", ""
    )
    (home / "bare.yaml").write_text(bare)
    path = str(home / "bare.yaml")
    cfg, warnings = load_config(path, judged)
    assert not cfg.reward.verifier and "the reward is the model's alone" in "\n".join(warnings)
    assert load_config(path, [*judged, "reward.verifier=true"])[0].reward.verifier
    sets = (
        f"actor_rollout.data_path={{a: {{path: {home}/train.parquet, verifier_function: [acc]}}}}"
    )
    assert load_config(path, [*judged, sets])[0].reward.verifier
    assert load_config(path)[0].reward.verifier


def test_preprocessed_data_has_no_column_of_categories(home) -> None:
    [source] = train_sources(load(home))
    layout = replace(source.layout, columns=source.layout.columns | {"category": "kind"})
    with pytest.raises(BadInput, match="has no column 'kind'"):
        layout.refuse_tokens("somewhere")


def test_a_tokenizer_that_cannot_encode_for_the_model_is_told_of(home, judged) -> None:
    folder = home / "other"
    folder.mkdir()
    named = [*judged, f"reward.tokenizer_name_or_path={folder}"]
    assert "has no tokenizer.json" in only(told(home, *named))
    (folder / "tokenizer.json").write_text(tokenizer_json("<|much|>", "<|more|>"))
    assert told(home, *named) == [], "more tokens than the policy's are no matter"
    many = tokenizer_json(*(f"<|{number}|>" for number in range(99)))
    (folder / "tokenizer.json").write_text(many)
    assert "ids up to" in only(told(home, *named))


def test_chat_templates_of_every_form_are_found(home) -> None:
    config = home / "net" / "tokenizer_config.json"
    assert chat_template(home / "net") is None
    for content, found in (
        ({"chat_template": "plain"}, "plain"),
        ({"chat_template": [{"name": "default", "template": "first"}]}, "first"),
        ({"chat_template": [{"name": "tools", "template": "other"}]}, None),
        ([], None),
    ):
        config.write_text(json.dumps(content))
        assert chat_template(home / "net") == found
    (home / "net" / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(BadInput, match="no text in UTF-8"):
        chat_template(home / "net")
