"""Loading: merging, spelling, types, overrides, and what is refused."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from support.small_config import MODEL, load, only, told, write

from r1zero.config.load import CONFIGS, SECTIONS, dump, read_config
from r1zero.config.schema import ROOT
from r1zero.config.validate import key_types, value_of
from r1zero.errors import BadInput, Diagnostics
from r1zero.policy.actor_config import objective_of, unread_by_loss
from r1zero.preflight.cautions import cautions
from r1zero.preflight.checks import check
from r1zero.preflight.resolve import load_config


def refusal(home: Path, text: str, *overrides: str) -> str:
    """What load_config says against base.yaml with `text` below it."""
    path = write(home, "bad", (home / "base.yaml").read_text() + textwrap.dedent(text))
    with pytest.raises(BadInput) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_base_breaks_no_rule(home: Path) -> None:
    assert check(load(home)) == []


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.yaml"))])
def test_shipped_configs_break_no_rule(name: str) -> None:
    cfg, warnings = load_config(name)
    assert check(cfg, absent_ok=True) == []
    assert all("num_samples_per_step" in warning for warning in warnings)
    assert cfg.name == name and cfg.output_dir == f"runs/{name}"


def test_shipped_7b_has_the_values_of_the_text() -> None:
    cfg, _ = load_config("qwen25_7b.yaml")
    actor, training = cfg.actor_rollout, cfg.training
    assert (training.global_batch_size, actor.n_samples_per_prompt, actor.ppo_mini_batch_size) == (
        120,
        4,
        60,
    )
    assert (actor.micro_batch_size, actor.num_samples_per_step, actor.max_prompt_length) == (
        2,
        2,
        2048,
    )
    assert (training.seq_length, cfg.response_budget, actor.temperature) == (4096, 2048, 1.0)
    assert (cfg.resource_pool.actor_rollout, cfg.resource_pool.ref, cfg.world_size) == (
        [8, 6],
        [2],
        16,
    )
    assert (actor.tensor_model_parallel_size, actor.pipeline_model_parallel_size) == (2, 4)
    assert (actor.adam_beta1, actor.adam_beta2) == (0.9, 0.95)  # from the model file
    assert (cfg.algorithm.kl_penalty, cfg.algorithm.kl_ctrl.kl_coef) == ("kl", 0.05)
    assert cfg.updates_per_step == 8


def test_role_wins_over_training_over_model_file(home: Path) -> None:
    keys = MODEL | {"lr": 1e-3, "clip_grad": 3.0, "adam_beta2": 0.9, "micro_batch_size": 1}
    (home / "model" / "small.yaml").write_text(yaml.safe_dump({"small": keys}))
    text = (
        (home / "base.yaml")
        .read_text()
        .replace("training: {", "training: {lr: 2e-3, clip_grad: 2.0, ")
    )
    path = write(
        home, "merge", text.replace("    model: small\n", "    model: small\n    lr: 3e-3\n")
    )
    cfg, _ = load_config(path)
    actor = cfg.actor_rollout
    assert (actor.lr, actor.clip_grad, actor.adam_beta2, actor.micro_batch_size) == (
        3e-3,
        2.0,
        0.9,
        4,
    )
    assert cfg.ref.micro_batch_size == 2


def test_training_key_in_model_file_and_role_is_honoured(home: Path) -> None:
    (home / "model" / "small.yaml").write_text(
        yaml.safe_dump({"small": MODEL | {"bf16": True, "seed": 7}})
    )
    cfg = load(home, "actor_rollout.seed=8")
    assert cfg.training.bf16 is True and cfg.training.seed == 8


@pytest.mark.parametrize("key", ["max-tokens-to-oom", "max_tokens_to_oom", "max-tokens_to-oom"])
def test_dashes_and_underscores_are_the_same(home: Path, key: str) -> None:
    assert load(home, f"actor_rollout.{key}=777").actor_rollout.max_tokens_to_oom == 777
    text = (home / "base.yaml").read_text()
    text = text.replace("max_prompt_length: 32", f"max-prompt-length: 32\n    {key}: 888")
    assert load_config(write(home, "spelled", text))[0].actor_rollout.max_tokens_to_oom == 888


def test_dashes_work_in_every_section(home: Path) -> None:
    text = (home / "base.yaml").read_text().replace("global_batch_size", "global-batch-size")
    text = text.replace("resource_pool", "resource-pool").replace(
        "verifier_weight", "verifier-weight"
    )
    text = text.replace("actor_rollout_ref", "actor-rollout-ref")
    text = text.replace("[acc, format],", "[acc, format], kl-ctrl: {kl-coef: 0.3},")
    cfg, _ = load_config(write(home, "dashes", text))
    assert cfg.algorithm.kl_ctrl.kl_coef == 0.3 and check(cfg) == []


def test_values_get_the_type_of_their_key(home: Path) -> None:
    cfg = load(
        home,
        "actor_rollout.lr=1e-6",
        "training.bf16='false'",
        "actor_rollout.max_tokens_to_oom=1e6",
        "actor_rollout.clip_grad=1",
        "training.no_shuffle='True'",
        "training.seed='12'",
        "name=7",
        'training.map_keys={"prompt": "problem"}',
        "algorithm.verifier_weight=[1, 5e-1]",
    )
    assert (
        cfg.actor_rollout.lr == 1e-6
        and cfg.training.bf16 is False
        and cfg.training.no_shuffle is True
    )
    assert (cfg.actor_rollout.max_tokens_to_oom, cfg.training.seed, cfg.name) == (1000000, 12, "7")
    assert (
        type(cfg.actor_rollout.clip_grad) is float
        and type(cfg.actor_rollout.max_tokens_to_oom) is int
    )
    columns = {"prompt": "problem", "query": "", "response": "ground_truth_answer", "system": ""}
    assert cfg.training.map_keys == columns | {"category": ""}
    assert cfg.algorithm.verifier_weight == [1.0, 0.5]


def test_a_text_of_several_lines_is_folded_or_refused(home: Path) -> None:
    text = (home / "base.yaml").read_text() + "output_dir: >\n  runs/a\n  b\n"
    assert load_config(write(home, "folded", text))[0].output_dir == "runs/a b"
    assert "output_dir: 'runs/a\\nb\\n' must be a text" in refusal(
        home, ("output_dir: |\n  runs/a\n  b\n")
    )


def test_numbers_with_leading_zeros_are_decimal(home: Path) -> None:
    assert load(home, "training.seed=017").training.seed == 17  # YAML 1.1 reads 15


def test_map_keys_as_the_preprocessing_command_had_them(home: Path) -> None:
    text = (
        (home / "base.yaml")
        .read_text()
        .replace(
            "training: {",
            ('training: {map-keys: \'{"prompt":"q", "query":"", "response": "a", "system":""}\', '),
        )
    )
    columns = load_config(write(home, "map", text))[0].training.map_keys
    assert columns == {"prompt": "q", "query": "", "response": "a", "system": "", "category": ""}


def test_overrides_reach_both_spellings_of_a_role(home: Path) -> None:
    cfg = load(
        home,
        "actor_rollout_ref.actor_rollout.lr=1e-5",
        "ref.micro_batch_size=3",
        "output_dir=runs/x",
        "algorithm.kl_ctrl.kl_coef=0.2",
        "training.eval_data_path=null",
    )
    assert (cfg.actor_rollout.lr, cfg.ref.micro_batch_size, cfg.output_dir) == (1e-5, 3, "runs/x")
    assert cfg.algorithm.kl_ctrl.kl_coef == 0.2 and cfg.training.eval_data_path is None


def test_defaults_that_follow_from_other_keys(home: Path) -> None:
    cfg = load(
        home,
        "actor_rollout.tensor_model_parallel_size=2",
        "actor_rollout.clip_ratio_high=0.28",
        "resource_pool.actor_rollout=null",
        "resource_pool.ref=null",
    )
    actor = cfg.actor_rollout
    assert (
        cfg.training.tokenizer_name_or_path == cfg.ref.load == actor.load
        and cfg.ref.model == "small"
    )
    assert actor.infer_tensor_parallel_size == 2 and cfg.algorithm.advantage == "group_norm"
    assert objective_of(cfg.algorithm, actor).settings == {"clip_low": 0.2, "clip_high": 0.28}
    assert cfg.resource_pool.actor_rollout == [3] and cfg.resource_pool.ref == [1]


def test_embedded_names_become_paths(home: Path) -> None:
    cfg, _ = load_config("tiny", ["actor_rollout.data_path=embedded:tiny/eval"])
    made = ROOT / ".cache" / "tiny"
    assert cfg.actor_rollout.load == cfg.ref.load == str(made / "model")
    assert cfg.actor_rollout.data_path == cfg.training.eval_data_path == str(made / "eval.parquet")
    assert load_config("tiny")[0].actor_rollout.data_path == str(made / "train.parquet")
    mixture, _ = load_config("tiny", ["actor_rollout.load=embedded:tiny_moe"])
    assert mixture.actor_rollout.load == str(ROOT / ".cache" / "tiny_moe" / "model")
    with pytest.raises(BadInput, match="embedded:huge is unknown.*embedded:tiny"):
        load_config("tiny", ["actor_rollout.load=embedded:huge"])


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.yaml"))])
def test_dump_loads_back_equal(name: str, tmp_path: Path) -> None:
    cfg, warnings = load_config(name)
    again, warnings_again = load_config(write(tmp_path, "config", dump(cfg)))
    assert again == cfg and warnings_again == warnings


def test_dump_of_unusual_values_loads_back_equal(home: Path) -> None:
    cfg = load(
        home,
        "actor_rollout.lr=1.23456789e-7",
        "algorithm.kl_ctrl.type=adaptive",
        "algorithm.lam=0.5",
        "algorithm.kl_ctrl.target_kl=0.1",
        "algorithm.kl_ctrl.horizon=1000",
        "training.map_keys.query=hint",
        "resource_pool.colocate=true",
        "name=odd-name",
        "actor_rollout.clip_ratio_high=0.28",
        "training.bf16=true",
    )
    elsewhere = home / "runs" / "odd"
    elsewhere.mkdir(parents=True)
    assert load_config(write(elsewhere, "config", dump(cfg)))[0] == cfg


def test_loading_and_checking_import_no_torch() -> None:
    code = (
        "import sys, r1zero.preflight.dry_run;"
        "from r1zero.preflight.resolve import load_config; from r1zero.preflight.checks import check;"
        "check(load_config('qwen25_7b')[0]);"
        "print([name for name in ('torch', 'transformers', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# -- what loading refuses ---


@pytest.mark.parametrize(
    "override, pieces",
    [
        ("training.train_itres=3", ["training.train_itres", "did you mean train_iters?"]),
        ("training.train_iters=many", ["training.train_iters", "'many'", "a whole number"]),
        ("training.train_iters=1.5", ["training.train_iters", "1.5", "a whole number"]),
        ("training.train_iters=true", ["training.train_iters", "True", "a whole number"]),
        ("training.bf16=1", ["training.bf16", "1 must be true or false"]),
        ("actor_rollout.lr=fast", ["actor_rollout.lr", "'fast'", "a number"]),
        ("actor_rollout.lr=nan", ["actor_rollout.lr", "nan", "a number"]),
        ("actor_rollout.lr=.nan", ["actor_rollout.lr", "nan", "a number"]),
        ("training.seed=4294967296", ["training.seed", "too large", "4294967295"]),
        ("training.seed=1e308", ["training.seed", "too large", "4294967295"]),
        (f"actor_rollout.lr={'9' * 400}", ["actor_rollout.lr", "too large"]),
        (f"training.seed={'9' * 5000}", ["training.seed", "a whole number"]),
        ("training.train_iters=!!int x", ["training.train_iters", "'!!int x'", "a whole number"]),
        ("training.train_iters=" + "[" * 5000, ["training.train_iters", "a whole number"]),
        ("reward.accuracy={1: 2}", ["reward.accuracy.1 is unknown"]),
        ("reward.accuracy={null: 2}", ["reward.accuracy.None is unknown"]),
        ("training.map_keys={1: a}", ["training.map_keys.1 is unknown"]),
        (
            "training={seed: 3}",
            ["'training={seed: 3}' must name a key of the section: training.key=value"],
        ),
        ("training..seed=3", ["training. is unknown"]),
        ('output_dir="a\\0"', ["output_dir", "a text"]),
        ('output_dir="\\ud800"', ["output_dir", "a text"]),
        ("actor_rollout.load=[a]", ["actor_rollout.load", "['a']", "a text"]),
        ("actor_rollout.load=null", ["actor_rollout.load is missing"]),
        ("resource_pool.ref=2", ["resource_pool.ref", "2 must be a list, such as [2]"]),
        ("resource_pool.ref=[1, 2", ["resource_pool.ref", "brackets or quotation marks do not"]),
        ("resource_pool.ref=[two]", ["resource_pool.ref[0]", "'two'", "a whole number"]),
        ("resource_pool.coloctae=true", ["resource_pool.coloctae", "did you mean colocate?"]),
        ("algorithm.kl_ctrl.coef=0.1", ["algorithm.kl_ctrl.coef is unknown", "kl_coef"]),
        ("algorithm.kl_ctrl=0.1", ["algorithm.kl_ctrl", "0.1 must be a section"]),
        ("algorithm.kl_ctrl.kl_coef.x=0.1", ["algorithm.kl_ctrl", "kl_coef"]),
        ("training.map_keys={answer: a}", ["training.map_keys.answer is unknown", "response"]),
        ("training.map_keys=question", ["training.map_keys", "not a JSON object"]),
        ("train_iters=3", ["train_iters=3", "did you mean training.train_iters?"]),
        ("trainning.train_iters=3", ["trainning", "did you mean training"]),
        ("actor_rollout_ref=3", ["'actor_rollout_ref=3' must have the form section.key=value"]),
        ("=3", ["'=3' must begin with one of the sections training"]),
        ("training.train_iters", ["'training.train_iters' must have the form section.key=value"]),
        (
            "actor_rollout.model=big",
            ["actor_rollout.model: big is not listed under defaults", "- model: [big]"],
        ),
        ("actor_rollout.num_layers=3", ["actor_rollout.num_layers", "model file"]),
        ("ref.seq_length=48", ["ref.seq_length: 48", "training.seq_length"]),
        ("ref.bf16=true", ["ref.bf16: True", "training.bf16"]),
        ("training.stage=ray_ppo", ["training.stage", "'ray_ppo'", "'ray_grpo'"]),
        ("training.split='90,10,0'", ["training.split", "'90,10,0'", "100,0,0"]),
        (
            "training.dataset_category='1,2'",
            ["training.dataset_category[1]", "must be 1 (rules) or 0 (model)"],
        ),
        (
            "training.tokenizer_type=Llama2Tokenizer",
            ["training.tokenizer_type", "PretrainedFromHF"],
        ),
        ("actor_rollout.hidden_dropout=0.1", ["actor_rollout.hidden_dropout", "0.1", "only 0"]),
    ],
)
def test_override_is_refused(home: Path, override: str, pieces: list[str]) -> None:
    sentence = refusal(home, "", override)
    assert "\n" not in sentence
    for piece in pieces:
        assert piece in sentence


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("critic: {lr: 1}", ["critic is not a section"]),
        ("trainig: {seed: 1}", ["trainig is not a section", "training"]),
        ("seed: 3", ["seed is not a section", "training.seed"]),
        ("reward: 3", ["reward: 3 must be a section"]),
        ("reward: {verifer: true}", ["reward.verifer is unknown", "verifier"]),
        (
            "reward: {workers: 2, workers: 3}",
            ["bad.yaml, line", "workers is given twice, as 2 and 3"],
        ),
        (
            "reward: {deadline-seconds: 2, deadline_seconds: 3}",
            ["deadline_seconds is given twice, as 2 and 3"],
        ),
        ("reward: [unclosed", ["bad.yaml, line"]),
        ('name: "unclosed', ["bad.yaml, line", "a quotation mark or bracket is not closed"]),
        ("reward:\n\tworkers: 2", ["bad.yaml, line", "a tab stands where YAML takes blanks"]),
        ("---\nname: again", ["bad.yaml, line", "a second document begins here"]),
        ("name: !!python/name:os.system", ["bad.yaml, line", "a tag (!) is not read here"]),
        ("reward: &r {inside: *r}", ["bad.yaml, line", "an alias (*) stands in what it"]),
        ("name: a: b", ["bad.yaml, line"]),
        ("name: a\0b", ["bad.yaml is not YAML", "#x0000", "position"]),
        ("name: !!int x", ["bad.yaml is not YAML", "does not fit its tag"]),
        ("name: !!bool maybe", ["bad.yaml is not YAML", "does not fit its tag"]),
        ("name: " + "[" * 5000, ["bad.yaml is not YAML", "nested too deep"]),
        ("model: {other: 3}", ["model other: 3 must be a section"]),
        ("model: {other: {num_layer: 3}}", ["model other: num_layer is unknown", "num_layers"]),
    ],
)
def test_file_is_refused(home: Path, text: str, pieces: list[str]) -> None:
    sentence = refusal(home, text)
    assert "\n" not in sentence
    for piece in pieces:
        assert piece in sentence


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"# nothing but a comment\n", "must hold sections such as `training:`, but is empty"),
        (b"- a\n- b\n", "but holds a list"),
        ("name: caf\u00e9".encode("latin-1"), "is not UTF-8 text; save it as UTF-8"),
    ],
)
def test_a_file_that_is_no_configuration_is_told_plainly(
    home: Path, content: bytes, said: str
) -> None:
    (home / "odd.yaml").write_bytes(content)
    with pytest.raises(BadInput, match=said):
        load_config(str(home / "odd.yaml"))


def test_override_into_a_section_that_is_none_is_refused(home: Path) -> None:
    assert "reward: 3 must be a section" in refusal(home, "reward: 3", "reward.workers=2")


def test_an_override_reaches_into_an_empty_section(home: Path) -> None:
    text = (home / "base.yaml").read_text().replace("algorithm: {", "algorithm: {kl_ctrl: null, ")
    cfg, _ = load_config(write(home, "empty", text), ["algorithm.kl_ctrl.kl_coef=0.3"])
    assert cfg.algorithm.kl_ctrl.kl_coef == 0.3
    with pytest.raises(BadInput, match="ref: False must be a section with keys"):
        load_config(write(home, "off", text.replace("ref: {micro_batch_size: 2}", "ref: false")))


def test_a_key_given_twice_with_one_value_is_accepted(home: Path) -> None:
    text = (home / "base.yaml").read_text() + "reward: {deadline-seconds: 2, deadline_seconds: 2}\n"
    assert load_config(write(home, "twice", text))[0].reward.deadline_seconds == 2.0


def test_all_mistakes_are_told_at_once(home: Path) -> None:
    """Of every kind: unknown, no number, out of bounds, no choice, and a rule among keys that are right."""
    sentences = refusal(
        home,
        "",
        "training.train_itres=3",
        "actor_rollout.lr=fast",
        "actor_rollout.top_p=2",
        "algorithm.kl_ctrl.type=linear",
        "reward.accuracy.rihgt=1",
        "resource_pool.ranks_per_node=2",
    ).splitlines()
    assert len(sentences) == 6, sentences
    for piece in (
        "train_itres is unknown; did you mean train_iters?",
        "lr: 'fast' must be a number",
        "top_p: 2.0",
        "kl_ctrl.type: linear is not one of fixed, adaptive",
        "accuracy.rihgt is unknown; did you mean right?",
        "ranks_per_node: 2 is less than the 3 ranks",
    ):
        assert any(piece in sentence for sentence in sentences), piece


def test_rules_that_need_a_wrong_key_are_not_told(home: Path) -> None:
    assert "\n" not in refusal(home, "", "actor_rollout.min_lr=1", "actor_rollout.lr=2")
    assert "\n" not in refusal(
        home, "", "training.train_iters=0", "actor_rollout.lr_warmup_iters=10"
    )
    both = refusal(home, "", "training.seq_length=0", "actor_rollout.min_lr=1").splitlines()
    assert len(both) == 2 and "actor_rollout.min_lr: 1.0 must not be above lr" in both[1]


@pytest.mark.parametrize("word", ["None", "none", "nil", "undefined"])
@pytest.mark.parametrize(
    "key",
    [
        "training.resume",
        "training.save_interval",
        "training.bf16",
        "algorithm.kl_ctrl.horizon",
        "training.eval_map_keys",
        "actor_rollout.recompute_granularity",
    ],
)
def test_words_of_other_languages_for_null_are_refused(home: Path, key: str, word: str) -> None:
    assert (
        refusal(home, "", f"{key}={word}")
        == f"{key}: {word} is a word to YAML; write null for no value"
    )


def test_null_means_the_default_at_every_depth(home: Path) -> None:
    nulls = [
        "reward.accuracy={right: null}",
        "reward.cosine=null",
        "actor_rollout.lr=null",
        "training.bf16=null",
    ]
    assert load(home, *nulls) == load(home)


def test_a_list_in_quotes_is_a_list(home: Path) -> None:
    cfg = load(
        home,
        "algorithm.verifier_function='[acc, format]'",
        "algorithm.verifier_weight='[0.25, 0.75]'",
    )
    assert (cfg.algorithm.verifier_function, cfg.algorithm.verifier_weight) == (
        ["acc", "format"],
        [0.25, 0.75],
    )


SECTION_KEYS = [
    (section, entry) for section, kind in SECTIONS.items() for entry in dataclasses.fields(kind)
]


@pytest.mark.parametrize(
    ("section", "entry"),
    SECTION_KEYS,
    ids=[f"{section}.{entry.name}" for section, entry in SECTION_KEYS],
)
def test_every_default_meets_what_its_key_asks(section: str, entry: dataclasses.Field) -> None:
    if entry.default is not dataclasses.MISSING:
        default = entry.default
    elif entry.default_factory is not dataclasses.MISSING:
        default = entry.default_factory()
    else:
        return  # such a key must be given
    if dataclasses.is_dataclass(default):
        default = dataclasses.asdict(default)
    notes = Diagnostics()
    value = value_of(key_types(SECTIONS[section])[entry.name], default, entry.name, notes)
    assert notes.problems == []
    assert (
        dataclasses.asdict(value) == default
        if dataclasses.is_dataclass(value)
        else value == default
    )


@pytest.mark.parametrize(
    ("section", "entry"),
    SECTION_KEYS,
    ids=[f"{section}.{entry.name}" for section, entry in SECTION_KEYS],
)
def test_every_key_refuses_what_is_none_of_its_values(
    home: Path, section: str, entry: dataclasses.Field
) -> None:
    sentence = refusal(home, "", f"{section}.{entry.name}=!!set {{a, b}}")
    assert f"{section}.{entry.name}: " in sentence and "Traceback" not in sentence


READS_ONLY_FILES = """
import os
import r1zero.config.load as load
load.read_config({path!r})  # what is imported on the way has been, then
looked = []
def watched(function):
    def look(path, *rest, **options):
        looked.append(os.fspath(path))
        return function(path, *rest, **options)
    return look
for name in ("stat", "lstat", "listdir", "scandir", "open"):
    setattr(os, name, watched(getattr(os, name)))
cfg, _ = load.read_config({path!r}, ["actor_rollout.load=~/model", "training.resume=$HOME/old"])
assert cfg.actor_rollout.load == "~/model" and cfg.training.bf16 is None
assert cfg.ref.load is None and cfg.training.tokenizer_name_or_path is None
print(sorted(set(looked)))
"""


def test_reading_looks_at_no_file_but_yaml(home: Path) -> None:
    path = str(home / "base.yaml")
    done = subprocess.run(
        [sys.executable, "-c", READS_ONLY_FILES.format(path=path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    looked = ast.literal_eval(done.stdout)
    assert path in looked and all(name.endswith(".yaml") for name in looked), looked


def test_reading_imports_neither_torch_nor_weights() -> None:
    code = (
        "import sys, r1zero.config.load;"
        "print([name for name in sys.modules if name.split('.')[0] == 'torch' or name.startswith('r1zero.weights')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_missing_configs_and_model_files_are_named(home: Path) -> None:
    with pytest.raises(BadInput, match="--config tinny.*did you mean tiny"):
        load_config("tinny")
    text = (home / "base.yaml").read_text().replace("[small]", "[smal]")
    with pytest.raises(BadInput, match=r"no model file smal\.yaml.*did you mean small"):
        load_config(write(home, "bad", text))
    (home / "model" / "small.yaml").write_text("num_layers: 4\n")
    with pytest.raises(BadInput, match="must have the one top-level key small"):
        load(home)
    with pytest.raises(BadInput, match="must hold sections"):
        load_config(write(home, "list", "[1, 2]"))


# -- keys that nothing reads --------------------------------------------------------------------

ADAPTIVE = ("algorithm.kl_ctrl.type=adaptive", "algorithm.kl_ctrl.target_kl=0.1")
STALE = ("training.staleness=1",)
HORIZON = "algorithm.kl_ctrl.horizon=1000"
EVAL = "training.eval_data_path=embedded:tiny"
MEETING = ["training.eval_interval=5", "training.save_interval=5"]


@pytest.mark.parametrize(
    ("overrides", "key", "reason"),
    [
        (["algorithm.kl_ctrl.target_kl=0.1"], "algorithm.kl_ctrl.target_kl", "type fixed"),
        ([HORIZON], "algorithm.kl_ctrl.horizon", "type fixed"),
        (
            [*ADAPTIVE, HORIZON, "algorithm.kl_ctrl.kl_coef=0"],
            "algorithm.kl_ctrl.target_kl",
            "0 stays 0",
        ),
        (["actor_rollout.min_lr=1e-8"], "actor_rollout.min_lr", "constant"),
        (
            ["ref.max_tokens_per_microbatch=4096", "ref.micro_batch_size=2"],
            "ref.micro_batch_size",
            "max_tokens_per_microbatch",
        ),
        (
            ["algorithm.advantage=group_norm", "algorithm.adv_estimator=mine.py:f"],
            "algorithm.adv_estimator",
            "algorithm.advantage says group_norm",
        ),
        (
            ["resource_pool.colocate=true", "actor_rollout.num_gpus_for_infer=2"],
            "actor_rollout.num_gpus_for_infer",
            "every rank has every role",
        ),
        (["training.sequence_parallel=true"], "training.sequence_parallel", "nothing is cut"),
        (["algorithm.correction.cap=3"], "algorithm.correction.cap", "weights is none"),
        (
            ["algorithm.kl_ctrl.kl_coef=0", "resource_pool.ref=[]", "algorithm.kl_penalty=k1"],
            "algorithm.kl_penalty",
            "there is no reference",
        ),
        (
            ["training.updates=accumulate"],
            "actor_rollout.ppo_mini_batch_size",
            "one step with all 48 responses",
        ),
        (["algorithm.max_rounds=5"], "algorithm.max_rounds", "only replace draws in rounds"),
        (
            [*STALE, "algorithm.correction.cap=3", "algorithm.old_logprobs=rollout"],
            "algorithm.correction.cap",
            "weights is none",
        ),
        (
            [*STALE, "algorithm.correction.low=0.3"],
            "algorithm.correction.low",
            "weights is clip; only mask reads it",
        ),
        (["algorithm.correction.veto=0.1"], "algorithm.correction.veto", "reject is none"),
        (["algorithm.entropy_ctrl.step=0.1"], "algorithm.entropy_ctrl.step", "type fixed"),
        (["training.keep_every=10"], "training.keep_every", "all checkpoints are kept"),
        (
            [EVAL, *MEETING, "training.keep_best=1"],
            "training.keep_best",
            "all checkpoints are kept",
        ),
        (["training.best_score=pass@1"], "training.best_score", "only keep_best asks"),
        (["training.eval_interval=5"], "training.eval_interval", "no eval_data_path"),
        (["training.eval_samples_per_prompt=8"], "training.eval_samples_per_prompt", "no eval"),
        (["training.eval_top_p=0.5"], "training.eval_top_p", "no eval_data_path"),
        (
            [EVAL, "training.eval_temperature=0", "training.eval_top_k=5"],
            "training.eval_top_k",
            "most likely",
        ),
    ],
)
def test_a_key_that_another_key_makes_idle_is_told(
    home: Path, overrides: list[str], key: str, reason: str
) -> None:
    before = read_config(str(home / "base.yaml"))[1]
    _, warnings = read_config(str(home / "base.yaml"), overrides)
    [warning] = [each for each in warnings if each not in before and key in each]
    assert ": accepted, no effect: " in warning and reason in warning


@pytest.mark.parametrize(
    "overrides",
    [
        [*ADAPTIVE, HORIZON],
        ["training.updates=accumulate", "actor_rollout.ppo_mini_batch_size=48"],
        ["algorithm.kl_ctrl.kl_coef=0", "algorithm.kl_penalty=k1"],  # ranks are named that tell it
        ["actor_rollout.lr_decay_style=linear", "actor_rollout.min_lr=1e-8"],
        ["training.keep_last=2", "training.keep_every=10"],
        [*STALE, "algorithm.correction.cap=3"],
        ["algorithm.correction={weights: mask, low: 0.3, reject: sequence, reject_low: 0.9}"],
        ["algorithm.entropy_ctrl={type: adaptive, target: 0.2, step: 0.1}"],
        [EVAL, "training.eval_temperature=0.5", "training.eval_top_k=5"],
        ["training.evaluation.math=embedded:tiny", "training.eval_interval=5"],
        # what holds anyway is not worth a word
        ["training.eval_top_p=1.0", "algorithm.adv_estimator=group_norm"],
    ],
)
def test_keys_that_are_read_are_not_told(home: Path, overrides: list[str]) -> None:
    before = read_config(str(home / "base.yaml"))[1]
    cfg, warnings = read_config(str(home / "base.yaml"), overrides)
    assert warnings == before
    assert read_config(write(home, "again", dump(cfg)))[1] == before


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ([], []),
        (["actor_rollout.top_k=-1", "actor_rollout.top_p=1.0"], []),
        (["actor_rollout.top_p=0.9"], ["actor_rollout.top_p: 0.9 cut"]),
        (
            ["actor_rollout.top_p=0.9", "actor_rollout.top_k=20"],
            ["actor_rollout.top_p: 0.9 and actor_rollout.top_k: 20 cut"],
        ),
    ],
)
def test_training_on_samples_of_a_cut_distribution_deserves_a_warning(
    home: Path, overrides: list[str], keys: list[str]
) -> None:
    warnings = cautions(load(home, *overrides))
    assert [warning.startswith(key) for warning, key in zip(warnings, keys, strict=True)] == [
        True for _ in keys
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["actor_rollout.clip_ratio=0.3"], {}),
        (["actor_rollout.clip_ratio=0.3", "actor_rollout.clip_ratio_high=0.4"], {}),
        (
            ["algorithm.loss=gspo", "actor_rollout.clip_ratio=0.2"],
            {"clip_ratio": "the loss gspo takes its bounds from algorithm.loss_settings"},
        ),
        (
            ["algorithm.loss=cispo", "actor_rollout.clip_ratio_high=0.28"],
            {"clip_ratio_high": "the loss cispo takes"},
        ),
        (
            ["algorithm.loss_settings.clip_low=0.1", "actor_rollout.clip_ratio_low=0.2"],
            {"clip_ratio_low": "the loss grpo takes its bounds from algorithm.loss_settings"},
        ),
        (
            [
                "actor_rollout.clip_ratio=0.3",
                "actor_rollout.clip_ratio_low=0.1",
                "actor_rollout.clip_ratio_high=0.2",
            ],
            {"clip_ratio": "clip_ratio_low and clip_ratio_high say it"},
        ),
    ],
)
def test_bounds_that_the_loss_does_not_read_are_told(
    home: Path, overrides: list[str], expected: dict[str, str]
) -> None:
    cfg = load(home, *overrides)
    warnings = unread_by_loss(cfg.algorithm, cfg.actor_rollout)
    assert len(warnings) == len(expected)
    for key, reason in expected.items():
        assert warnings[0].startswith(f"actor_rollout.{key}: accepted, no effect: {reason}")


# -- evaluation sets ------------------------------------------------------------------------------


def test_an_evaluation_set_takes_what_it_leaves_out_from_the_run(home: Path) -> None:
    cfg, _ = read_config(
        str(home / "base.yaml"),
        [
            "training.eval_samples_per_prompt=3",
            "training.eval_top_k=7",
            "training.evaluation.tiny=embedded:tiny",
            "training.evaluation.aime-24={path: aime.jsonl, samples-per-prompt: 16, temperature: 0}",
            "training.evaluation.aime-24.prompt_type=plain",
        ],
    )
    tiny, aime = cfg.training.evaluation.values()
    assert list(cfg.training.evaluation) == ["tiny", "aime_24"]
    assert tiny.path.endswith("eval.parquet") and aime.path == "aime.jsonl"
    assert (tiny.samples_per_prompt, tiny.temperature, tiny.top_k) == (3, 1.0, 7)
    assert (aime.samples_per_prompt, aime.temperature, aime.top_k) == (16, 0.0, 7)
    assert (tiny.prompt_type, aime.prompt_type) == ("qwen_r1", "plain")
    (home / "again.yaml").write_text(dump(cfg))
    assert read_config(str(home / "again.yaml"))[0].training == cfg.training


@pytest.mark.parametrize(
    ("override", "pieces"),
    [
        ("evaluation=5", ["training.evaluation: 5 must map names"]),
        ("evaluation={math 500: x}", ["training.evaluation: 'math 500' must be a name"]),
        ("evaluation.math.k=3", ["training.evaluation.math.k is unknown"]),
        ("evaluation.math.tempratur=1", ["evaluation.math.tempratur", "did you mean temperature"]),
        ("evaluation.math.temperature=1", ["training.evaluation.math.path is missing"]),
        ("evaluation.math={path: x, temperature: -1}", ["math.temperature: -1", "from 0.01"]),
        ("evaluation.math={path: x, map_keys: {a: b}}", ["evaluation.math.map_keys.a is unknown"]),
    ],
)
def test_a_wrong_evaluation_set_is_told_with_its_name(
    home: Path, override: str, pieces: list[str]
) -> None:
    with pytest.raises(BadInput) as error:
        read_config(str(home / "base.yaml"), [f"training.{override}"])
    for piece in pieces:
        assert piece in str(error.value)


@pytest.mark.parametrize(
    ("save", "asked", "interval"),
    [(10, 10, 10), (10, 20, 20), (10, 5, 5), (10, 15, 20), (15, 10, 15), (7, 30, 35)],
)
def test_evaluations_meet_the_checkpoints_of_which_the_best_are_kept(
    home: Path, save: int, asked: int, interval: int
) -> None:
    options = [
        "training.evaluation.tiny=embedded:tiny",
        "training.keep_last=1",
        f"training.save_interval={save}",
        f"training.eval_interval={asked}",
    ]
    before, usual = read_config(str(home / "base.yaml"), options)
    assert (before.training.eval_interval, before.training.best_score) == (asked, None)
    cfg, warnings = read_config(str(home / "base.yaml"), [*options, "training.keep_best=2"])
    assert (cfg.training.eval_interval, cfg.training.best_score) == (interval, "tiny/pass@1")
    said = [warning for warning in warnings if warning not in usual]
    assert len(said) == (asked != interval)
    assert all(f"{asked} becomes {interval}" in warning for warning in said)


@pytest.mark.parametrize(
    ("overrides", "key", "pieces"),
    [
        (["stop_at={pass@1: 0.5}"], "stop_at", ["eval_data_path or evaluation and eval_interval"]),
        (["keep_best=2", EVAL], "keep_best", ["set eval_interval and save_interval, too"]),
        (
            [
                "stop_at={math/pass@1: 0.5}",
                "eval_interval=1",
                "evaluation.aime=embedded:tiny",
                EVAL,
            ],
            "stop_at",
            ["math/pass@1 is of no evaluation set", "pass@1, aime/pass@1"],
        ),
        (
            ["keep_best=2", "best_score=pass@1", "evaluation.aime=embedded:tiny", *MEETING],
            "best_score",
            ["pass@1 is of no evaluation set", "there are aime/pass@1"],
        ),
        (["stop_at={pass@1: high}", EVAL], "stop_at.pass@1", ["'high' must be a number"]),
    ],
)
def test_what_waits_for_scores_needs_evaluations(
    home: Path, overrides: list[str], key: str, pieces: list[str]
) -> None:
    sections = [f"training.{text.removeprefix('training.')}" for text in overrides]
    problem = only(told(home, *sections))
    assert problem.startswith(f"training.{key}: ")
    for piece in pieces:
        assert piece in problem
