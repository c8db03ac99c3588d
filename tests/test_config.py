"""Loading, merging, spelling, and every rule with a value that breaks it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import save_file

from r1zero.checks import check
from r1zero.config import ROOT, RULE_NAMES, Config, nodes, placement
from r1zero.loading import CONFIGS, dump, load_config

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_theta": 10000.0}

# 1 train, 2 rollout, 1 ref; every rule holds.
BASE = """
defaults:
  - model: [small]
training: {global_batch_size: 12, seq_length: 96, train_iters: 5}
actor_rollout_ref:
  actor_rollout:
    model: small
    load: LOAD
    data_path: DATA
    n_samples_per_prompt: 4
    ppo_mini_batch_size: 24
    micro_batch_size: 4
    num_samples_per_step: 3
    max_prompt_length: 32
    num_gpus_for_infer: 2
  ref: {micro_batch_size: 2}
algorithm: {verifier_function: [acc, format], verifier_weight: [0.5, 0.5]}
resource_pool: {actor_rollout: [3], ref: [1]}
"""
MODEL = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "padded_vocab_size": 128}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a model, its model file, data and base.yaml."""
    folder = tmp_path / "net"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"a": np.zeros((3, 5), np.float32), "b": np.ones(7, np.float32)}, folder / "model.safetensors")
    pq.write_table(pa.table({"question": ["1+1?"], "ground_truth_answer": ["2"]}), tmp_path / "train.parquet")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "small.yaml").write_text(yaml.safe_dump({"small": MODEL}))
    write(tmp_path, "base", BASE.replace("LOAD", str(folder)).replace("DATA", str(tmp_path / "train.parquet")))
    return tmp_path


def write(home: Path, name: str, text: str) -> str:
    path = home / f"{name}.yaml"
    path.write_text(textwrap.dedent(text))
    return str(path)


def load(home: Path, *overrides: str) -> Config:
    return load_config(str(home / "base.yaml"), overrides)[0]


def refusal(home: Path, text: str, *overrides: str) -> str:
    """What load_config says against base.yaml with `text` below it."""
    path = write(home, "bad", (home / "base.yaml").read_text() + textwrap.dedent(text))
    with pytest.raises(ValueError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# Loading ------------------------------------------------------------------------------------------------------------


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
    assert (training.global_batch_size, actor.n_samples_per_prompt, actor.ppo_mini_batch_size) == (120, 4, 60)
    assert (actor.micro_batch_size, actor.num_samples_per_step, actor.max_prompt_length) == (2, 2, 2048)
    assert (training.seq_length, cfg.response_budget, actor.temperature) == (4096, 2048, 1.0)
    assert (cfg.resource_pool.actor_rollout, cfg.resource_pool.ref, cfg.world_size) == ([8, 6], [2], 16)
    assert (actor.tensor_model_parallel_size, actor.pipeline_model_parallel_size) == (2, 4)
    assert (actor.adam_beta1, actor.adam_beta2) == (0.9, 0.95)  # from the model file
    assert (cfg.algorithm.kl_penalty, cfg.algorithm.kl_ctrl.kl_coef) == ("kl", 0.05)
    assert cfg.updates_per_step == 8


def test_role_wins_over_training_over_model_file(home: Path) -> None:
    keys = MODEL | {"lr": 1e-3, "clip_grad": 3.0, "adam_beta2": 0.9, "micro_batch_size": 1}
    (home / "model" / "small.yaml").write_text(yaml.safe_dump({"small": keys}))
    text = (home / "base.yaml").read_text().replace("training: {", "training: {lr: 2e-3, clip_grad: 2.0, ")
    path = write(home, "merge", text.replace("    model: small\n", "    model: small\n    lr: 3e-3\n"))
    cfg, _ = load_config(path)
    actor = cfg.actor_rollout
    assert (actor.lr, actor.clip_grad, actor.adam_beta2, actor.micro_batch_size) == (3e-3, 2.0, 0.9, 4)
    assert cfg.ref.micro_batch_size == 2


def test_training_key_in_model_file_and_role_is_honoured(home: Path) -> None:
    (home / "model" / "small.yaml").write_text(yaml.safe_dump({"small": MODEL | {"bf16": True, "seed": 7}}))
    cfg = load(home, "actor_rollout.seed=8")
    assert cfg.training.bf16 is True and cfg.training.seed == 8


@pytest.mark.parametrize("key", ["max-tokens-to-oom", "max_tokens_to_oom", "max-tokens_to-oom"])
def test_dashes_and_underscores_are_the_same(home: Path, key: str) -> None:
    assert load(home, f"actor_rollout.{key}=777").actor_rollout.max_tokens_to_oom == 777
    text = (home / "base.yaml").read_text().replace("max_prompt_length: 32", f"max-prompt-length: 32\n    {key}: 888")
    assert load_config(write(home, "spelled", text))[0].actor_rollout.max_tokens_to_oom == 888


def test_dashes_work_in_every_section(home: Path) -> None:
    text = (home / "base.yaml").read_text().replace("global_batch_size", "global-batch-size")
    text = text.replace("resource_pool", "resource-pool").replace("verifier_weight", "verifier-weight")
    text = text.replace("actor_rollout_ref", "actor-rollout-ref").replace("[acc, format],", "[acc, format], kl-ctrl: {kl-coef: 0.3},")
    cfg, _ = load_config(write(home, "dashes", text))
    assert cfg.algorithm.kl_ctrl.kl_coef == 0.3 and check(cfg) == []


def test_values_get_the_type_of_their_key(home: Path) -> None:
    cfg = load(home, "actor_rollout.lr=1e-6", "training.bf16='false'", "actor_rollout.max_tokens_to_oom=1e6",
               "actor_rollout.clip_grad=1", "training.no_shuffle='True'", "training.seed='12'", "name=7",
               "training.map_keys={\"prompt\": \"problem\"}", "algorithm.verifier_weight=[1, 5e-1]")
    assert cfg.actor_rollout.lr == 1e-6 and cfg.training.bf16 is False and cfg.training.no_shuffle is True
    assert (cfg.actor_rollout.max_tokens_to_oom, cfg.training.seed, cfg.name) == (1000000, 12, "7")
    assert isinstance(cfg.actor_rollout.clip_grad, float) and isinstance(cfg.actor_rollout.max_tokens_to_oom, int)
    assert cfg.training.map_keys == {"prompt": "problem", "query": "", "response": "ground_truth_answer", "system": ""}
    assert cfg.algorithm.verifier_weight == [1.0, 0.5]


def test_map_keys_as_the_preprocessing_command_had_them(home: Path) -> None:
    text = (home / "base.yaml").read_text().replace(
        "training: {", "training: {map-keys: '{\"prompt\":\"q\", \"query\":\"\", \"response\": \"a\", \"system\":\"\"}', ")
    columns = load_config(write(home, "map", text))[0].training.map_keys
    assert columns == {"prompt": "q", "query": "", "response": "a", "system": ""}


def test_overrides_reach_both_spellings_of_a_role(home: Path) -> None:
    cfg = load(home, "actor_rollout_ref.actor_rollout.lr=1e-5", "ref.micro_batch_size=3", "output_dir=runs/x",
               "algorithm.kl_ctrl.kl_coef=0.2", "training.eval_data_path=null")
    assert (cfg.actor_rollout.lr, cfg.ref.micro_batch_size, cfg.output_dir) == (1e-5, 3, "runs/x")
    assert cfg.algorithm.kl_ctrl.kl_coef == 0.2 and cfg.training.eval_data_path is None


def test_defaults_that_follow_from_other_keys(home: Path) -> None:
    cfg = load(home, "actor_rollout.tensor_model_parallel_size=2", "actor_rollout.clip_ratio_high=0.28",
               "resource_pool.actor_rollout=null", "resource_pool.ref=null")
    actor = cfg.actor_rollout
    assert cfg.training.tokenizer_name_or_path == cfg.ref.load == actor.load and cfg.ref.model == "small"
    assert actor.infer_tensor_parallel_size == 2 and (actor.clip_ratio_low, actor.clip_ratio_high) == (0.2, 0.28)
    assert cfg.resource_pool.actor_rollout == [3] and cfg.resource_pool.ref == [1]


def test_embedded_names_become_paths(home: Path) -> None:
    cfg, _ = load_config("tiny", ["actor_rollout.data_path=embedded:tiny/eval"])
    made = ROOT / ".cache" / "tiny"
    assert cfg.actor_rollout.load == cfg.ref.load == str(made / "model")
    assert cfg.actor_rollout.data_path == cfg.training.eval_data_path == str(made / "eval.parquet")
    assert load_config("tiny")[0].actor_rollout.data_path == str(made / "train.parquet")
    with pytest.raises(ValueError, match="embedded:huge is unknown.*embedded:tiny"):
        load_config("tiny", ["actor_rollout.load=embedded:huge"])


def test_running_samples_follow_the_token_limit(home: Path) -> None:
    cfg = load(home, "actor_rollout.max_tokens_to_oom=1000")  # 1000 / 96 = 10.4
    assert cfg.running_samples(2) == 10 and cfg.running_samples(12) == 4  # 12 replicas have one prompt each
    assert load(home, "actor_rollout.max_running_samples=3").running_samples(2) == 3


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.yaml"))])
def test_dump_loads_back_equal(name: str, tmp_path: Path) -> None:
    cfg, warnings = load_config(name)
    again, warnings_again = load_config(write(tmp_path, "config", dump(cfg)))
    assert again == cfg and warnings_again == warnings


def test_dump_of_unusual_values_loads_back_equal(home: Path) -> None:
    cfg = load(home, "actor_rollout.lr=1.23456789e-7", "algorithm.kl_ctrl.type=adaptive", "algorithm.lam=0.5",
               "algorithm.kl_ctrl.target_kl=0.1", "algorithm.kl_ctrl.horizon=1000", "training.map_keys.query=hint",
               "resource_pool.colocate=true", "actor_rollout.clip_ratio_high=0.28", "name=odd-name", "training.bf16=true")
    elsewhere = home / "runs" / "odd"
    elsewhere.mkdir(parents=True)
    assert load_config(write(elsewhere, "config", dump(cfg)))[0] == cfg


def test_loading_and_checking_import_no_torch() -> None:
    code = ("import sys; from r1zero.loading import load_config; from r1zero.checks import check; import r1zero.dryrun;"
            "check(load_config('qwen25_7b')[0]); print([m for m in ('torch', 'transformers', 'sympy') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What loading refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("override, pieces", [
    ("training.train_itres=3", ["training.train_itres", "did you mean train_iters?"]),
    ("training.train_iters=many", ["training.train_iters", "'many'", "a whole number"]),
    ("training.train_iters=1.5", ["training.train_iters", "1.5", "a whole number"]),
    ("training.train_iters=true", ["training.train_iters", "True", "a whole number"]),
    ("training.bf16=1", ["training.bf16", "1 must be true or false"]),
    ("actor_rollout.lr=fast", ["actor_rollout.lr", "'fast'", "a number"]),
    ("actor_rollout.lr=nan", ["actor_rollout.lr", "nan", "a number"]),
    ("actor_rollout.lr=.nan", ["actor_rollout.lr", "nan", "a number"]),
    ("actor_rollout.load=[a]", ["actor_rollout.load", "['a']", "a text"]),
    ("actor_rollout.load=null", ["actor_rollout.load is missing"]),
    ("resource_pool.ref=2", ["resource_pool.ref", "2 must be a list, such as [2]"]),
    ("resource_pool.ref=[two]", ["resource_pool.ref[0]", "'two'", "a whole number"]),
    ("resource_pool.coloctae=true", ["resource_pool.coloctae", "did you mean colocate?"]),
    ("algorithm.kl_ctrl.coef=0.1", ["algorithm.kl_ctrl.coef is unknown", "kl_coef"]),
    ("algorithm.kl_ctrl=0.1", ["algorithm.kl_ctrl", "0.1 must be a section"]),
    ("algorithm.kl_ctrl.kl_coef.x=0.1", ["algorithm.kl_ctrl", "kl_coef"]),
    ("training.map_keys={answer: a}", ["training.map_keys.answer is unknown", "response"]),
    ("training.map_keys=question", ["training.map_keys", "not a JSON object"]),
    ("train_iters=3", ["train_iters=3", "did you mean training.train_iters?"]),
    ("trainning.train_iters=3", ["trainning", "did you mean training"]),
    ("training.train_iters", ["'training.train_iters' must have the form section.key=value"]),
    ("actor_rollout.model=big", ["actor_rollout.model: big is not listed under defaults", "- model: [big]"]),
    ("actor_rollout.num_layers=3", ["actor_rollout.num_layers", "model file"]),
    ("ref.seq_length=48", ["ref.seq_length: 48", "training.seq_length"]),
    ("ref.bf16=true", ["ref.bf16: True", "training.bf16"]),
    ("training.stage=ray_ppo", ["training.stage", "'ray_ppo'", "'ray_grpo'"]),
    ("training.split='90,10,0'", ["training.split", "'90,10,0'", "100,0,0"]),
    ("training.dataset_category='1,0'", ["training.dataset_category", "'1,0'", "reward model"]),
    ("training.tokenizer_type=Llama2Tokenizer", ["training.tokenizer_type", "PretrainedFromHF"]),
    ("actor_rollout.hidden_dropout=0.1", ["actor_rollout.hidden_dropout", "0.1", "only 0"]),
])
def test_override_is_refused(home: Path, override: str, pieces: list[str]) -> None:
    sentence = refusal(home, "", override)
    assert "\n" not in sentence
    for piece in pieces:
        assert piece in sentence


@pytest.mark.parametrize("text, pieces", [
    ("critic: {lr: 1}", ["critic is not a section"]),
    ("trainig: {seed: 1}", ["trainig is not a section", "training"]),
    ("seed: 3", ["seed is not a section", "training.seed"]),
    ("reward: 3", ["reward: 3 must be a section"]),
    ("reward: {verifer: true}", ["reward.verifer is unknown", "verifier"]),
    ("reward: {workers: 2, workers: 3}", ["bad.yaml, line", "workers is given twice, as 2 and 3"]),
    ("reward: {deadline-seconds: 2, deadline_seconds: 3}", ["deadline_seconds is given twice, as 2 and 3"]),
    ("reward: [unclosed", ["bad.yaml, line"]),
    ("name: a: b", ["bad.yaml, line"]),
    ("model: {other: {num_layer: 3}}", ["model other: num_layer is unknown", "num_layers"]),
])
def test_file_is_refused(home: Path, text: str, pieces: list[str]) -> None:
    sentence = refusal(home, text)
    for piece in pieces:
        assert piece in sentence


def test_a_key_given_twice_with_one_value_is_accepted(home: Path) -> None:
    text = (home / "base.yaml").read_text() + "reward: {deadline-seconds: 2, deadline_seconds: 2}\n"
    assert load_config(write(home, "twice", text))[0].reward.deadline_seconds == 2.0


def test_all_mistakes_are_told_at_once(home: Path) -> None:
    sentences = refusal(home, "", "training.train_itres=3", "actor_rollout.lr=fast").splitlines()
    assert len(sentences) == 2


def test_missing_configs_and_model_files_are_named(home: Path) -> None:
    with pytest.raises(ValueError, match="--config tinny.*did you mean tiny"):
        load_config("tinny")
    text = (home / "base.yaml").read_text().replace("[small]", "[smal]")
    with pytest.raises(ValueError, match=r"no model file smal\.yaml.*did you mean small"):
        load_config(write(home, "bad", text))
    (home / "model" / "small.yaml").write_text("num_layers: 4\n")
    with pytest.raises(ValueError, match="must have the one top-level key small"):
        load(home)
    with pytest.raises(ValueError, match="must hold sections"):
        load_config(write(home, "list", "[1, 2]"))


# Rules --------------------------------------------------------------------------------------------------------------

RULES = [
    # Each key by itself.
    (["training.global_batch_size=0"], ["training.global_batch_size: 0 must be at least 1"]),
    (["training.train_iters=0"], ["training.train_iters: 0 must be at least 1"]),
    (["actor_rollout.tensor_model_parallel_size=0"], ["actor_rollout.tensor_model_parallel_size: 0", "at least 1"]),
    (["actor_rollout.n_samples_per_prompt=1"], ["actor_rollout.n_samples_per_prompt: 1", "at least 2", "group_norm"]),
    (["actor_rollout.temperature=0"], ["actor_rollout.temperature: 0.0", "1.0"]),
    (["actor_rollout.top_p=1.5"], ["actor_rollout.top_p: 1.5", "at most 1"]),
    (["actor_rollout.top_k=-2"], ["actor_rollout.top_k: -2", "-1"]),
    (["actor_rollout.do_sample=false"], ["actor_rollout.do_sample: false must be true"]),
    (["actor_rollout.shuffle_minibatch=true"], ["actor_rollout.shuffle_minibatch: true must be false"]),
    (["actor_rollout.clip_ratio=0"], ["actor_rollout.clip_ratio: 0.0", "0.2"]),
    (["actor_rollout.clip_ratio_low=1.5"], ["actor_rollout.clip_ratio_low: 1.5", "0.2"]),
    (["actor_rollout.clip_ratio_high=0"], ["actor_rollout.clip_ratio_high: 0.0", "0.28"]),
    (["actor_rollout.lr=-1e-6"], ["actor_rollout.lr: -1e-06 must not be negative"]),
    (["actor_rollout.entropy_coeff=-1"], ["actor_rollout.entropy_coeff: -1.0 must not be negative"]),
    (["actor_rollout.clip_grad=-1"], ["actor_rollout.clip_grad: -1.0 must not be negative; 0"]),
    (["actor_rollout.adam_beta1=1"], ["actor_rollout.adam_beta1: 1.0", "0.9"]),
    (["actor_rollout.adam_beta2=1"], ["actor_rollout.adam_beta2: 1.0", "0.95"]),
    (["actor_rollout.adam_eps=0"], ["actor_rollout.adam_eps: 0.0", "1e-8"]),
    (["actor_rollout.lr_warmup_fraction=1"], ["actor_rollout.lr_warmup_fraction: 1.0", "0.1"]),
    (["actor_rollout.lr_decay_style=cosin"], ["actor_rollout.lr_decay_style: cosin", "did you mean cosine?"]),
    (["actor_rollout.recompute_granularity=selective"], ["actor_rollout.recompute_granularity: selective", "full"]),
    (["training.distributed_backend=mpi"], ["training.distributed_backend: mpi", "gloo"]),
    (["reward.verifier=false"], ["reward.verifier: false must be true"]),
    (["reward.deadline_seconds=0"], ["reward.deadline_seconds: 0.0", "10"]),
    (["algorithm.gamma=0.9"], ["algorithm.gamma: 0.9 must be 1.0"]),
    (["algorithm.adv_estimator=gae"], ["algorithm.adv_estimator: gae", "group_norm", "critic"]),
    (["algorithm.kl_penalty=full"], ["algorithm.kl_penalty: full", "low_var_kl", "logits"]),
    (["algorithm.kl_penalty=k3"], ["algorithm.kl_penalty: k3", "kl, abs, mse, low_var_kl"]),
    (["algorithm.kl_ctrl.type=linear"], ["algorithm.kl_ctrl.type: linear", "fixed, adaptive"]),
    (["algorithm.kl_ctrl.kl_coef=-0.1"], ["algorithm.kl_ctrl.kl_coef: -0.1 must not be negative"]),
    (["resource_pool.reward=[1]"], ["resource_pool.reward: [1] must be []"]),
    # Rewards, KL, schedule.
    (["algorithm.verifier_weight=[1.0]"], ["algorithm.verifier_weight: [1.0]", "1 weights", "2 rules", "[0.5, 0.5]"]),
    (["algorithm.verifier_function=[acc, fromat]"], ["algorithm.verifier_function: fromat", "did you mean format?"]),
    (["algorithm.verifier_function=[acc, acc]"], ["algorithm.verifier_function: ['acc', 'acc']", "each once"]),
    (["algorithm.kl_ctrl.type=adaptive", "algorithm.kl_ctrl.target_kl=0.1"],
     ["algorithm.kl_ctrl.horizon: nothing must be above 0", "10000"]),
    (["algorithm.kl_ctrl.type=adaptive", "algorithm.kl_ctrl.horizon=5", "algorithm.kl_ctrl.target_kl=0"],
     ["algorithm.kl_ctrl.target_kl: 0.0 must be above 0", "0.1"]),
    (["actor_rollout.min_lr=1"], ["actor_rollout.min_lr: 1.0", "lr 1e-06", "0.0 works"]),
    (["actor_rollout.lr_warmup_iters=1", "actor_rollout.lr_warmup_fraction=0.5"],
     ["actor_rollout.lr_warmup_iters: 1", "lr_warmup_fraction 0.5", "set one of them to 0"]),
    (["actor_rollout.lr_warmup_iters=10"], ["actor_rollout.lr_warmup_iters: 10", "10 updates", "9 is the most"]),
    # Ranks.
    (["resource_pool.actor_rollout=[2]"], ["resource_pool.actor_rollout: [2] adds up to 2", "[3] would work"]),
    (["resource_pool.actor_rollout=[3, 0]"], ["resource_pool.actor_rollout: [3, 0]"]),
    (["actor_rollout.num_gpus_for_train=3", "actor_rollout.pipeline_model_parallel_size=2",
      "resource_pool.actor_rollout=[5]"],
     ["actor_rollout.num_gpus_for_train: 3 must be a multiple of 2", "pipeline_model_parallel_size 2", "2 and 4"]),
    (["actor_rollout.num_gpus_for_infer=3", "actor_rollout.infer_tensor_parallel_size=2",
      "resource_pool.actor_rollout=[4]"],
     ["actor_rollout.num_gpus_for_infer: 3 must be a multiple of 2", "infer_tensor_parallel_size 2", "2 and 4"]),
    (["resource_pool.ref=[3]", "ref.tensor_model_parallel_size=2"],
     ["resource_pool.ref: 3 must be a multiple of 2", "ref.tensor_model_parallel_size 2", "2 and 4"]),
    (["resource_pool.ranks_per_node=2"], ["resource_pool.ranks_per_node: 2", "3 would work"]),
    # Batches; 2 rollout replicas, num_samples_per_step 3, micro_batch_size 4.
    (["training.global_batch_size=8", "actor_rollout.ppo_mini_batch_size=32"],
     ["training.global_batch_size: 8 must be a multiple of 6", "rollout replicas 2 x num_samples_per_step 3", "12"]),
    (["training.global_batch_size=18", "actor_rollout.ppo_mini_batch_size=24"],
     ["training.global_batch_size: 18 must be a multiple of 4", "micro_batch_size 4", "12 and 24"]),
    (["ref.micro_batch_size=5"],
     ["training.global_batch_size: 12 must be a multiple of 5", "ref.micro_batch_size 5", "60"]),
    (["actor_rollout.ppo_mini_batch_size=36"],
     ["actor_rollout.ppo_mini_batch_size: 36 must divide the 48 responses", "24 and 48"]),
    (["actor_rollout.ppo_mini_batch_size=16"],
     ["actor_rollout.ppo_mini_batch_size: 16 must be a multiple of 6", "num_samples_per_step 3", "24"]),
    (["actor_rollout.ppo_mini_batch_size=6"],
     ["actor_rollout.ppo_mini_batch_size: 6 must be a multiple of 4", "micro_batch_size 4", "12"]),
    # Lengths.
    (["actor_rollout.max_prompt_length=96"], ["actor_rollout.max_prompt_length: 96", "seq_length 96", "95"]),
    (["actor_rollout.max_tokens_to_oom=95"], ["actor_rollout.max_tokens_to_oom: 95", "96 is the least"]),
    (["actor_rollout.max_tokens_per_microbatch=50"], ["actor_rollout.max_tokens_per_microbatch: 50", "96"]),
    (["ref.max_tokens_per_microbatch=50"], ["ref.max_tokens_per_microbatch: 50", "96"]),
    (["training.seq_length=257"], ["training.seq_length: 257", "256"]),
    # The model: 4 layers, 4 heads, 2 kv heads.
    (["actor_rollout.tensor_model_parallel_size=3", "actor_rollout.num_gpus_for_train=3",
      "actor_rollout.infer_tensor_parallel_size=1", "resource_pool.actor_rollout=[5]"],
     ["actor_rollout.tensor_model_parallel_size: 3", "num_attention_heads 4", "num_query_groups 2", "2 would work"]),
    (["actor_rollout.infer_tensor_parallel_size=4", "actor_rollout.num_gpus_for_infer=4",
      "resource_pool.actor_rollout=[5]"],
     ["actor_rollout.infer_tensor_parallel_size: 4 does not divide num_query_groups 2", "2 would work"]),
    (["ref.tensor_model_parallel_size=4", "resource_pool.ref=[4]"],
     ["ref.tensor_model_parallel_size: 4 does not divide num_query_groups 2", "2 would work"]),
    (["actor_rollout.pipeline_model_parallel_size=3", "actor_rollout.num_gpus_for_train=3",
      "resource_pool.actor_rollout=[5]"],
     ["actor_rollout.pipeline_model_parallel_size: 3 does not divide num_layers 4", "2 and 4"]),
    (["ref.pipeline_model_parallel_size=3", "resource_pool.ref=[3]"],
     ["ref.pipeline_model_parallel_size: 3 does not divide num_layers 4", "2 and 4"]),
    # The template.
    (["training.prompt_type=qwen_r2"], ["training.prompt_type", "qwen_r2", "qwen_r1"]),
    (["training.prompt_type_path=/nowhere.json"], ["training.prompt_type", "/nowhere.json"]),
]


@pytest.mark.parametrize("overrides, pieces", RULES, ids=[" ".join(overrides) for overrides, _ in RULES])
def test_rule(home: Path, overrides: list[str], pieces: list[str]) -> None:
    problems = check(load(home, *overrides))
    assert any(all(piece in problem for piece in pieces) for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


def test_named_neighbours_work(home: Path) -> None:
    for value in (24, 48):
        assert check(load(home, f"actor_rollout.ppo_mini_batch_size={value}")) == []
    for value in (12, 24):
        assert check(load(home, f"training.global_batch_size={value}")) == []
    assert check(load(home, "training.global_batch_size=60", "ref.micro_batch_size=5")) == []
    assert check(load(home, "training.seq_length=256")) == []


def test_token_budgets_replace_the_rules_of_microbatch_sizes(home: Path) -> None:
    odd = ["actor_rollout.micro_batch_size=7", "ref.micro_batch_size=11"]
    assert len(check(load(home, *odd))) == 3
    assert check(load(home, *odd, "actor_rollout.max_tokens_per_microbatch=96", "ref.max_tokens_per_microbatch=96")) == []


@pytest.mark.parametrize("world_size, pieces", [(5, ["5 ranks", "need 4", "1 train + 2 rollout + 1 ref"]), (3, ["need 4"])])
def test_world_of_another_size_than_the_pool_is_refused(home: Path, world_size: int, pieces: list[str]) -> None:
    (problem,) = check(load(home), world_size)
    assert all(piece in problem for piece in pieces)


def test_world_of_one_has_all_roles(home: Path) -> None:
    cfg = load(home)
    assert check(cfg, 1) == []
    placed = placement(cfg, 1)
    assert placed.colocated and placed.roles_of(0) == ["train", "rollout", "ref"]
    (problem,) = check(load(home, "ref.tensor_model_parallel_size=2", "resource_pool.ref=[2]"), 1)
    assert "ref.tensor_model_parallel_size: 2 must be 1" in problem


def test_colocated_roles_span_the_world(home: Path) -> None:
    cfg = load(home, "resource_pool.colocate=true", "actor_rollout.micro_batch_size=1", "actor_rollout.num_samples_per_step=1",
               "ref.micro_batch_size=1")
    assert cfg.world_size == 3 and check(cfg) == [] and check(cfg, 4) == []
    assert [span.size for span in placement(cfg, 4).spans] == [4, 4, 4]


def test_tensor_parallel_group_must_not_cross_nodes(home: Path) -> None:
    cfg = load(home, "actor_rollout.infer_tensor_parallel_size=2", "actor_rollout.num_samples_per_step=6")
    assert check(cfg, 4, [0, 0, 0, 1]) == []
    (problem,) = check(cfg, 4, [0, 0, 1, 1])  # rollout ranks are 1 and 2
    assert "rollout ranks [1, 2]" in problem and "nodes [0, 1]" in problem


def test_nodes_without_a_launcher(home: Path) -> None:
    assert nodes(load(home), 4) == [0, 0, 0, 0]
    assert nodes(load(home, "resource_pool.ranks_per_node=2"), 4) == [0, 0, 1, 1]
    assert nodes(load_config("qwen25_7b", ["resource_pool.actor_rollout=[6, 8]"])[0], 16) == [0] * 8 + [1] * 8


def test_model_file_must_agree_with_config_json(home: Path) -> None:
    wrong = {"num_layers": 5, "hidden_size": 64, "num_query_groups": 4, "rotary_base": 1000000, "add_qkv_bias": False,
             "max_position_embeddings": 512}
    (home / "model" / "small.yaml").write_text(yaml.safe_dump({"small": MODEL | wrong}))
    problems = check(load(home))
    for key, right in (("num_layers: 5", "4 would"), ("hidden_size: 64", "32 would"), ("num_query_groups: 4", "2 would"),
                       ("rotary_base: 1000000.0", "10000.0 would"), ("add_qkv_bias: false", "true would"),
                       ("max_position_embeddings: 512", "256 is the most")):
        assert any(f"model small: {key}" in problem and right in problem for problem in problems), key


def test_model_file_may_shorten_the_positions(home: Path) -> None:
    (home / "model" / "small.yaml").write_text(yaml.safe_dump({"small": MODEL | {"max_position_embeddings": 90}}))
    assert any("training.seq_length: 96" in problem and "90 is the most" in problem for problem in check(load(home)))


def test_rule_names_are_those_of_the_rewards() -> None:
    from r1zero.reward.rules import RULES as scorers
    assert set(RULE_NAMES) == set(scorers)


# Files --------------------------------------------------------------------------------------------------------------


def only(problems: list[str]) -> str:
    assert len(problems) == 1, problems
    return problems[0]


def test_missing_model_folder(home: Path) -> None:
    cfg = load(home, f"actor_rollout.load={home}/nte")
    problem = only(check(cfg))
    assert "actor_rollout.load" in problem and f"{home}/nte does not exist" in problem and "did you mean net?" in problem
    assert check(cfg, absent_ok=True) == []


def test_missing_tiny_model_names_the_tool(home: Path) -> None:
    problem = only(check(load(home, f"actor_rollout.load={home}/.cache/tiny/model")))
    assert "tools/make_tiny.py" in problem


def test_folder_without_config_json(home: Path) -> None:
    (home / "net" / "config.json").unlink()
    assert "config.json does not exist" in only(check(load(home)))
    assert "config.json does not exist" in only(check(load(home), absent_ok=True))


def test_megatron_checkpoint_is_not_a_model_folder(home: Path) -> None:
    (home / "net" / "latest_checkpointed_iteration.txt").write_text("1")
    problem = only(check(load(home)))
    assert "actor_rollout.load" in problem and "Megatron checkpoint" in problem and "Hugging Face" in problem


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_cut_off_weights(home: Path, keep: int) -> None:
    weights = home / "net" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    problem = only(check(load(home)))
    assert "actor_rollout.load" in problem and str(weights) in problem and "copy it again" in problem


@pytest.mark.parametrize("content", [b"\xff" * 64, (9).to_bytes(8, "little") + b"[1, 2, 3]", b"PK" * 50])
def test_corrupt_weights(home: Path, content: bytes) -> None:
    (home / "net" / "model.safetensors").write_bytes(content)
    assert "no safetensors header" in only(check(load(home)))


def test_missing_shard_is_named(home: Path) -> None:
    net = home / "net"
    (net / "model.safetensors").rename(net / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (net / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors cannot be read" in only(check(load(home)))
    (net / "model.safetensors.index.json").write_text("{}")
    assert "is not an index" in only(check(load(home)))


def test_folder_without_weights_or_tokenizer(home: Path) -> None:
    (home / "net" / "model.safetensors").unlink()
    (home / "net" / "tokenizer.json").unlink()
    weights, tokenizer = check(load(home))
    assert "model.safetensors" in weights and "training.tokenizer_name_or_path" in tokenizer


def test_reference_of_another_vocabulary(home: Path) -> None:
    other = home / "other"
    other.mkdir()
    for file in (home / "net").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text(json.dumps(SHAPE | {"vocab_size": 64}))
    problems = check(load(home, f"ref.load={other}"))
    assert any("ref.load" in problem and "64 rows" in problem and "128" in problem for problem in problems)


@pytest.mark.parametrize("name, content, pieces", [
    ("gone.parquet", None, ["does not exist"]),
    ("empty.jsonl", "", ["holds no rows"]),
    ("blank.jsonl", "\n\n", ["holds no rows"]),
    ("empty.json", "[]", ["holds no rows"]),
    ("bad.jsonl", "{\"question\": ", ["cannot be read"]),
    ("bad.json", "{\"question\": \"x\"}", ["cannot be read", "objects"]),
    ("bad.parquet", "not parquet", ["cannot be read"]),
    ("data.bin", "x", ["'.bin' is not one of .parquet, .jsonl, .json"]),
    ("other.jsonl", "{\"questions\": \"1?\", \"ground_truth_answer\": \"1\"}",
     ["training.map_keys.prompt", "no column question", "did you mean questions?"]),
    ("other.json", "[{\"question\": \"1?\", \"label\": \"1\"}]",
     ["training.map_keys.response", "no column ground_truth_answer", "question, label"]),
])
def test_bad_data(home: Path, name: str, content: str | None, pieces: list[str]) -> None:
    if content is not None:
        (home / name).write_text(content)
    for key in ("actor_rollout.data_path", "training.eval_data_path"):
        problem = only(check(load(home, f"{key}={home / name}")))
        for piece in pieces:
            assert piece in problem
        assert name in problem and ("map_keys" in problem or problem.startswith(key))


def test_empty_parquet_and_missing_column(home: Path) -> None:
    pq.write_table(pa.table({"question": pa.array([], pa.string()), "ground_truth_answer": pa.array([], pa.string())}),
                   home / "train.parquet")
    assert "holds no rows" in only(check(load(home)))
    pq.write_table(pa.table({"question": ["x"], "answer": ["y"]}), home / "train.parquet")
    assert "has no column ground_truth_answer" in only(check(load(home)))
    assert check(load(home, "training.map_keys.response=answer")) == []


# Configurations that users bring along ------------------------------------------------------------------------------

OLD_MODEL = """
qwen25-7b:
  use_mcore_models: true
  num_layers: 28
  hidden_size: 3584
  ffn_hidden_size: 18944
  num_attention_heads: 28
  rotary_base: 1000000
  max_position_embeddings: 32768
  make_vocab_size_divisible_by: 1
  padded_vocab_size: 152064
  untie_embeddings_and_output_weights: true
  add_qkv_bias: true
  disable_bias_linear: true
  group_query_attention: true
  num_query_groups: 4
  seq_length: 4096
  position_embedding_type: rope
  normalization: RMSNorm
  swiglu: true
  attention_dropout: 0.0
  hidden_dropout: 0.0
  init_method_std: 0.01
  adam_beta1: 0.9
  adam_beta2: 0.95
  attention_softmax_in_fp32: true
  no_gradient_accumulation_fusion: true
  no_masked_softmax_fusion: true
  use_flash_attn: true
  use_fused_rmsnorm: true
  use_fused_rotary_pos_emb: true
  use_fused_swiglu: true
  use_mc2: true
  bf16: true
"""
OLD = """
defaults:
  - model:
      - qwen25-7b
training:
  global_batch_size: 12
  seq_length: 4096
  tokenizer_type: PretrainedFromHF
  tokenizer_name_or_path: ./models/Qwen2.5-Math-7B
  train_iters: 100
  distributed_backend: nccl
  no_shared_storage: true
  save_interval: 10
  no_load_optim: true
  no_load_rng: true
  bf16: true
  is_instruction_dataset: true
  variable_seq_lengths: true
  no_shuffle: false
  stage: ray_grpo
  sequence_parallel: true
  dataset_additional_keys: labels
actor_rollout_ref:
  actor_rollout:
    model: qwen25-7b
    do_sample: true
    micro_batch_size: 2
    ppo_mini_batch_size: 12
    num_samples_per_step: 2
    temperature: 1.0
    max_prompt_length: 2048
    max-tokens-to-oom: 1000000
    ppo_epochs: 1
    clip_ratio: 0.2
    entropy_coeff: 0.001
    shuffle_minibatch: false
    use_kv_cache: true
    tensor_model_parallel_size: 2
    pipeline_model_parallel_size: 4
    lr: 1e-6
    lr_decay_style: constant
    min_lr: 0.0
    weight_decay: 0.0
    lr_warmup_fraction: 0.0
    clip_grad: 10000.0
    initial_loss_scale: 4096
    finetune: true
    load: ./ckpt
    save: ./ckpt
    num_gpus_for_train: 8
    num_gpus_for_infer: 6
    data_path: ./dataset/pe-nlp/data
    split: 100,0,0
    n_samples_per_prompt: 4
  ref:
    model: qwen25-7b
    tensor_model_parallel_size: 2
    pipeline_model_parallel_size: 1
    micro_batch_size: 4
    load: ./ckpt
reward:
  model: qwen25-7b
  verifier: true
  tensor_model_parallel_size: 2
  pipeline_model_parallel_size: 1
  micro_batch_size: 4
  load: ./ckpt
algorithm:
  gamma: 1.0
  lam: 0.95
  adv_estimator: group_norm
  kl_penalty: kl
  kl_ctrl:
    type: fixed
    kl_coef: 0.05
  missing_eos_penalty: 0.0
  verifier_function: ["acc", "format"]
  verifier_weight: [0.5, 0.5]
  advantage_whiten: False
resource_pool:
  actor_rollout: [8, 6]
  ref: [2]
  reward: []
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "qwen25-7b.yaml").write_text(OLD_MODEL)
    return tmp_path


def test_old_main_config_loads_and_names_what_has_no_effect(old: Path) -> None:
    cfg, warnings = load_config(write(old, "grpo_trainer_qwen25_7b", OLD))
    assert check(cfg, absent_ok=True) == []
    assert (cfg.actor_rollout.lr, cfg.actor_rollout.adam_beta2, cfg.training.bf16) == (1e-6, 0.95, True)
    assert cfg.model["qwen25-7b"]["rotary_base"] == 1000000.0 and "norm_epsilon" not in cfg.model["qwen25-7b"]
    told = "\n".join(warnings)
    for key in ("training.no_shared_storage", "training.no_load_optim", "training.no_load_rng",
                "training.is_instruction_dataset", "training.variable_seq_lengths", "training.dataset_additional_keys",
                "actor_rollout.num_samples_per_step", "actor_rollout.use_kv_cache", "actor_rollout.initial_loss_scale",
                "actor_rollout.finetune", "reward.model", "reward.tensor_model_parallel_size", "reward.load",
                "algorithm.lam", "algorithm.missing_eos_penalty", "model qwen25-7b: use_mc2",
                "model qwen25-7b: init_method_std"):
        assert key in told, key
    for key in ("training.seq_length", "actor_rollout.lr", "actor_rollout.max_tokens_to_oom", "training.stage"):
        assert key not in told, key
    assert all("accepted, no effect: " in warning for warning in warnings)


@pytest.mark.parametrize("spelling", ["has-labels: true", "has_labels: true", "dataset_with_labels: true"])
def test_old_config_with_the_values_of_the_text(old: Path, spelling: str) -> None:
    text = OLD.replace("global_batch_size: 12", "global_batch_size: 120").replace("dataset_additional_keys: labels", spelling)
    text = text.replace("ppo_mini_batch_size: 12", "ppo_mini_batch_size: 60").replace("[8, 6]", "[6,8]")
    cfg, warnings = load_config(write(old, "text", text))
    assert check(cfg, absent_ok=True) == [] and cfg.updates_per_step == 8
    assert any(spelling.split(":")[0].replace("-", "_") in warning for warning in warnings)


def test_old_reason_config_loads(old: Path) -> None:
    text = OLD
    for before, after in (
            ("global_batch_size: 12", "global_batch_size: 4"), ("ppo_mini_batch_size: 12", "ppo_mini_batch_size: 4"),
            ("n_samples_per_prompt: 4", "n_samples_per_prompt: 2"), ("for_train: 8", "for_train: 4"),
            ("for_infer: 6", "for_infer: 2"), ("max-tokens-to-oom: 1000000", "max-tokens-to-oom: 999999"),
            ("additional_keys: labels", "additional_keys: labels categories\n  dataset_category: 1\n  no_save_optim: true"
                                        "\n  no_save_rng: true"),
            ("    tensor_model_parallel_size: 2\n    pipeline_model_parallel_size: 4",
             "    tensor_model_parallel_size: 1\n    pipeline_model_parallel_size: 4"),
            ("    tensor_model_parallel_size: 2\n    pipeline_model_parallel_size: 1",
             "    tensor_model_parallel_size: 1\n    pipeline_model_parallel_size: 1"),
            ("[8, 6]", "[6]"), ("ref: [2]", "ref: [1]"), ("[\"acc\", \"format\"]", "[\"acc\"]"), ("[0.5, 0.5]", "[1.0]")):
        assert before in text
        text = text.replace(before, after)
    cfg, warnings = load_config(write(old, "grpo_trainer_qwen25_7b_reason", text))
    assert check(cfg, absent_ok=True) == []
    assert cfg.training.sequence_parallel is False
    assert any("training.sequence_parallel" in warning and "tensor_model_parallel_size is 1" in warning
               for warning in warnings)
    assert any("training.no_save_optim" in warning for warning in warnings)


def test_old_llama_config_loads_and_its_reward_model_is_refused(old: Path) -> None:
    (old / "model" / "llama32-1b.yaml").write_text("""
llama32-1b:
  use_mcore_models: true
  num_layers: 16
  hidden_size: 2048
  ffn_hidden_size: 8192
  num_attention_heads: 32
  group_query_attention: true
  num_query_groups: 8
  max_position_embeddings: 8192
  padded_vocab_size: 128256
  rotary_base: 500000
  normalization: RMSNorm
  norm_epsilon: 1e-5
  swiglu: true
""")
    config = yaml.safe_load(OLD.replace("qwen25-7b", "llama32-1b").replace("lr: 1e-6", "lr: 1e-7"))
    config["training"] |= {"global_batch_size": 4, "seq_length": 512, "train_iters": 1000, "save_interval": 10000,
                           "no_shuffle": True, "sequence_parallel": False}
    actor = config["actor_rollout_ref"]["actor_rollout"]
    actor |= {"micro_batch_size": 1, "ppo_mini_batch_size": 1, "num_samples_per_step": 1, "max_prompt_length": 256,
              "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "adam_beta1": 0.9, "adam_beta2": 0.999,
              "pad_to_multiple_of": 1, "num_gpus_for_train": 1, "num_gpus_for_infer": 1}
    config["actor_rollout_ref"]["ref"]["tensor_model_parallel_size"] = 1
    config["reward"] = {"model": "llama32-1b", "micro_batch_size": 4, "load": "./ckpt"}
    del config["algorithm"]["verifier_function"], config["algorithm"]["verifier_weight"]
    config["resource_pool"] = {"actor_rollout": [2], "ref": [1], "reward": [1]}
    cfg, warnings = load_config(write(old, "grpo_trainer_llama32_1b", yaml.safe_dump(config)))
    assert cfg.actor_rollout.lr == 1e-7 and cfg.algorithm.verifier_function == ["acc"]
    assert any("pad_to_multiple_of" in warning for warning in warnings)
    assert "resource_pool.reward: [1] must be []" in only(check(cfg, absent_ok=True))
    assert check(load_config(str(old / "grpo_trainer_llama32_1b.yaml"), ["resource_pool.reward=[]"])[0], absent_ok=True) == []
