"""Every rule, with a value that breaks it: the sentence names key, value and a neighbour that
works."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import save_file
from support.small_config import MODEL, SHAPE, load, only, told, weights

from r1zero.config.schema import nodes, placement
from r1zero.data.indexed import IndexedWriter
from r1zero.data.preprocessed import stem
from r1zero.data.prompts import load_tokenizer
from r1zero.errors import BadInput
from r1zero.preflight.check_custom import check_custom
from r1zero.preflight.checks import check
from r1zero.preflight.resolve import load_config

# Minibatches that cut the groups of eight.
CUT = ["actor_rollout.n_samples_per_prompt=8", "actor_rollout.ppo_mini_batch_size=4"]
RULES = [
    # Each key by itself.
    (
        ["training.global_batch_size=0"],
        ["training.global_batch_size: 0 must be from 1 to 1000000, such as 120"],
    ),
    (["training.train_iters=0"], ["training.train_iters: 0 must be at least 1"]),
    (
        ["actor_rollout.tensor_model_parallel_size=0"],
        ["actor_rollout.tensor_model_parallel_size: 0", "at least 1"],
    ),
    (
        ["actor_rollout.n_samples_per_prompt=1"],
        ["actor_rollout.n_samples_per_prompt: 1", "at least 2", "group_norm"],
    ),
    (["actor_rollout.temperature=0"], ["actor_rollout.temperature: 0.0", "1.0"]),
    (["actor_rollout.top_p=1.5"], ["actor_rollout.top_p: 1.5", "at most 1"]),
    (["actor_rollout.top_k=-2"], ["actor_rollout.top_k: -2", "-1"]),
    (["actor_rollout.do_sample=false"], ["actor_rollout.do_sample: false must be true"]),
    (
        ["actor_rollout.shuffle_minibatch=true"],
        ["actor_rollout.shuffle_minibatch: true must be false"],
    ),
    (["actor_rollout.clip_ratio=0"], ["actor_rollout.clip_ratio: 0.0", "0.2"]),
    (["actor_rollout.clip_ratio_low=1.5"], ["actor_rollout.clip_ratio_low: 1.5", "0.2"]),
    (["actor_rollout.clip_ratio_high=0"], ["actor_rollout.clip_ratio_high: 0.0", "0.28"]),
    (["actor_rollout.lr=-1e-6"], ["actor_rollout.lr: -1e-06 must be from 0 to 1, such as 1e-06"]),
    (["actor_rollout.entropy_coeff=-1"], ["actor_rollout.entropy_coeff: -1.0 must be from 0 to 1"]),
    (["actor_rollout.clip_grad=-1"], ["actor_rollout.clip_grad: -1.0 must not be negative; 0"]),
    (["actor_rollout.adam_beta1=1"], ["actor_rollout.adam_beta1: 1.0", "0.9"]),
    (["actor_rollout.adam_beta2=1"], ["actor_rollout.adam_beta2: 1.0", "0.9"]),
    (["actor_rollout.adam_eps=0"], ["actor_rollout.adam_eps: 0.0", "1e-08"]),
    (["actor_rollout.adam_eps=5e-324"], ["actor_rollout.adam_eps: 5e-324 must be from 1e-20 to 1"]),
    (["actor_rollout.lr_warmup_fraction=1"], ["actor_rollout.lr_warmup_fraction: 1.0", "below 1"]),
    (
        ["actor_rollout.lr_decay_style=cosin"],
        ["actor_rollout.lr_decay_style: cosin", "did you mean cosine?"],
    ),
    (
        ["actor_rollout.recompute_granularity=selective"],
        ["actor_rollout.recompute_granularity: selective", "full"],
    ),
    (["training.staleness=2"], ["training.staleness: 2 must be from 0 to 1"]),
    (["training.parts=0"], ["training.parts: 0 must be from 1 to 1024, such as 8"]),
    (["training.updates=acumulate"], ["training.updates: acumulate", "did you mean accumulate?"]),
    (
        ["training.updates=accumulate", "algorithm.advantage_whiten=true"],
        ["algorithm.advantage_whiten: true needs all samples", "updates to per_minibatch"],
    ),
    (
        ["algorithm.keep_accuracy=[0.2,0.8]", "algorithm.advantage=reinforce_pp"],
        ["algorithm.keep_accuracy: [0.2, 0.8]", "whitened", "equal_groups to replace"],
    ),
    (
        ["algorithm.aggregation=group_token_mean", *CUT],
        ["ppo_mini_batch_size: 4 must be whole groups", "group_token_mean, such as 8"],
    ),
    (
        ["algorithm.advantage=lite_ppo", *CUT],
        ["ppo_mini_batch_size: 4 must be whole groups", "advantage: lite_ppo, such as 8"],
    ),
    (["algorithm.correction.cap=0.5"], ["algorithm.correction.cap: 0.5 must be from 1 to 1000"]),
    (["training.distributed_backend=mpi"], ["training.distributed_backend: mpi", "gloo"]),
    (["reward.verifier=false"], ["reward.verifier: false leaves the reward to a reward model"]),
    (["reward.deadline_seconds=0"], ["reward.deadline_seconds: 0.0", "10"]),
    (["algorithm.gamma=0.9"], ["algorithm.gamma: 0.9 must be 1.0"]),
    (["algorithm.adv_estimator=gae"], ["algorithm.adv_estimator: gae", "group_norm", "critic"]),
    (["algorithm.kl_penalty=full"], ["algorithm.kl_penalty: full", "low_var_kl", "logits"]),
    (["algorithm.kl_penalty=k4"], ["algorithm.kl_penalty: k4", "kl, abs, mse, low_var_kl"]),
    (["algorithm.kl_ctrl.type=linear"], ["algorithm.kl_ctrl.type: linear", "fixed, adaptive"]),
    (["algorithm.kl_ctrl.kl_coef=-0.1"], ["algorithm.kl_ctrl.kl_coef: -0.1 must be from 0 to 100"]),
    (
        ["resource_pool.reward=[1]"],
        ["resource_pool.reward: [1] names ranks", "reward.load names no weights"],
    ),
    # What would only fail in the workers: no number would be left, or no memory, or no time.
    (
        ["training.global_batch_size=4294967295"],
        ["training.global_batch_size: 4294967295 must be from 1"],
    ),
    (
        ["actor_rollout.n_samples_per_prompt=1e9"],
        ["actor_rollout.n_samples_per_prompt: 1000000000", "at least 2"],
    ),
    (
        ["actor_rollout.temperature=1e-30"],
        ["actor_rollout.temperature: 1e-30 must be from 0.01 to 100"],
    ),
    (
        ["training.eval_temperature=1e308"],
        ["training.eval_temperature: 1e+308", "or 0 for the most likely"],
    ),
    (["actor_rollout.top_p=5e-324"], ["actor_rollout.top_p: 5e-324 must be at least 1e-06"]),
    (["actor_rollout.clip_ratio_high=1e308"], ["actor_rollout.clip_ratio_high: 1e+308", "0.28"]),
    (
        ["actor_rollout.infer_tensor_parallel_size=0"],
        ["actor_rollout.infer_tensor_parallel_size: 0"],
    ),
    (
        ["reward.deadline_seconds=1e-9"],
        ["reward.deadline_seconds: 1e-09 must be from 0.01 to 86400"],
    ),
    (["reward.workers=1e5"], ["reward.workers: 100000 must be from 1 to 1024"]),
    (
        ["reward.accuracy.right=1e308"],
        ["reward.accuracy.right: 1e+308 must be from -1000000 to 1000000"],
    ),
    (
        ["reward.accuracy.copied_span=rigth"],
        ["reward.accuracy.copied_span: rigth is not one of wrong, right; did you mean right?"],
    ),
    (
        ["algorithm.verifier_weight=[1e300, 1]"],
        ["algorithm.verifier_weight: [1e+300, 1.0]", "each of them"],
    ),
    (["training.profile_steps=[0]"], ["training.profile_steps: [0] must list steps from 1 on"]),
    (
        ["training.distributed_timeout_minutes=1e9"],
        ["training.distributed_timeout_minutes: 1000000000"],
    ),
    (["training.publish_bucket_megabytes=1e9"], ["training.publish_bucket_megabytes: 1000000000"]),
    (
        ["resource_pool.actor_rollout=[4000000000]", "resource_pool.colocate=true"],
        ["[4000000000] must list"],
    ),
    # Rewards, KL, schedule.
    (
        ["algorithm.verifier_weight=[1.0]"],
        ["algorithm.verifier_weight: [1.0]", "1 weights", "2 reward functions", "[0.5, 0.5]"],
    ),
    (
        ["algorithm.verifier_function=[acc, fromat]"],
        ["algorithm.verifier_function: fromat", "did you mean format?"],
    ),
    (
        ["algorithm.verifier_function=[acc, acc]"],
        ["algorithm.verifier_function: ['acc', 'acc']", "each once"],
    ),
    (
        ["algorithm.verifier_function=[format, cosine]"],
        ["algorithm.verifier_function: cosine depends on", "name acc"],
    ),
    (["reward.max_failure_rate=5"], ["reward.max_failure_rate: 5.0 must be from 0 to 1", "0.05"]),
    (
        ["algorithm.kl_ctrl.type=adaptive", "algorithm.kl_ctrl.target_kl=0.1"],
        ["algorithm.kl_ctrl.horizon: nothing must be above 0", "10000"],
    ),
    (
        [
            "algorithm.kl_ctrl.type=adaptive",
            "algorithm.kl_ctrl.horizon=5",
            "algorithm.kl_ctrl.target_kl=0",
        ],
        ["algorithm.kl_ctrl.target_kl: 0.0 must be above 0", "0.1"],
    ),
    (["actor_rollout.min_lr=1"], ["actor_rollout.min_lr: 1.0", "lr 1e-06", "0.0 works"]),
    (
        ["actor_rollout.lr_warmup_iters=1", "actor_rollout.lr_warmup_fraction=0.5"],
        ["actor_rollout.lr_warmup_iters: 1", "lr_warmup_fraction 0.5", "set one of them to 0"],
    ),
    (
        ["actor_rollout.lr_warmup_iters=10"],
        ["actor_rollout.lr_warmup_iters: 10", "10 updates", "9 is the most"],
    ),
    # Ranks.
    (
        ["resource_pool.actor_rollout=[2]"],
        ["resource_pool.actor_rollout: [2] adds up to 2", "[3] would work"],
    ),
    (["resource_pool.actor_rollout=[3, 0]"], ["resource_pool.actor_rollout: [3, 0]"]),
    (
        [
            "actor_rollout.num_gpus_for_train=3",
            "actor_rollout.pipeline_model_parallel_size=2",
            "resource_pool.actor_rollout=[5]",
        ],
        [
            "actor_rollout.num_gpus_for_train: 3 must be a multiple of 2",
            "pipeline_model_parallel_size 2",
            "2 and 4",
        ],
    ),
    (
        [
            "actor_rollout.num_gpus_for_infer=3",
            "actor_rollout.infer_tensor_parallel_size=2",
            "resource_pool.actor_rollout=[4]",
        ],
        [
            "actor_rollout.num_gpus_for_infer: 3 must be a multiple of 2",
            "infer_tensor_parallel_size 2",
            "2 and 4",
        ],
    ),
    (
        ["resource_pool.ref=[3]", "ref.tensor_model_parallel_size=2"],
        [
            "resource_pool.ref: 3 must be a multiple of 2",
            "ref.tensor_model_parallel_size 2",
            "2 and 4",
        ],
    ),
    (["resource_pool.ranks_per_node=2"], ["resource_pool.ranks_per_node: 2", "3 would work"]),
    # Batches.
    (
        ["actor_rollout.ppo_mini_batch_size=36"],
        ["actor_rollout.ppo_mini_batch_size: 36 must divide the 48 responses", "24 and 48"],
    ),
    (
        ["training.global_batch_size=11"],
        ["ppo_mini_batch_size: 24 must divide the 44 responses", "22 and 44"],
    ),
    # Groups.
    (
        ["algorithm.equal_groups=skip", "algorithm.advantage_whiten=true"],
        ["algorithm.equal_groups: skip", "advantage_whiten: true", "set it to false"],
    ),
    (
        ["algorithm.equal_groups=replace", "training.staleness=1"],
        ["training.staleness: 1", "replace", "set staleness to 0"],
    ),
    (
        ["algorithm.equal_groups=replace", "training.minibatch_order=expected_length"],
        [
            "training.minibatch_order: expected_length",
            "short answers",
            "set minibatch_order to drawn",
        ],
    ),
    (
        ["algorithm.equal_groups=replace", "actor_rollout.ppo_mini_batch_size=6"],
        [
            "actor_rollout.ppo_mini_batch_size: 6",
            "whole groups",
            "n_samples_per_prompt 4",
            "such as 8",
        ],
    ),
    (
        ["algorithm.keep_accuracy=[0.8, 0.2]"],
        ["algorithm.keep_accuracy: [0.8, 0.2]", "the smaller first", "[0.2, 0.8]"],
    ),
    (
        [
            "algorithm.keep_accuracy=[0.2, 0.8]",
            "algorithm.verifier_function=[format]",
            "algorithm.verifier_weight=[1]",
        ],
        ["algorithm.keep_accuracy: [0.2, 0.8]", "has none", "name acc"],
    ),
    # Lengths.
    (
        ["actor_rollout.max_prompt_length=96"],
        ["actor_rollout.max_prompt_length: 96", "seq_length 96", "95"],
    ),
    (
        ["actor_rollout.max_tokens_to_oom=95"],
        ["actor_rollout.max_tokens_to_oom: 95", "96 is the least"],
    ),
    (
        ["actor_rollout.max_tokens_per_microbatch=50"],
        ["actor_rollout.max_tokens_per_microbatch: 50", "96"],
    ),
    (["ref.max_tokens_per_microbatch=50"], ["ref.max_tokens_per_microbatch: 50", "96"]),
    (["training.seq_length=257"], ["training.seq_length: 257", "256"]),
    # The model: 4 layers, 4 heads, 2 kv heads.
    (
        [
            "actor_rollout.tensor_model_parallel_size=3",
            "actor_rollout.num_gpus_for_train=3",
            "actor_rollout.infer_tensor_parallel_size=1",
            "resource_pool.actor_rollout=[5]",
        ],
        [
            "actor_rollout.tensor_model_parallel_size: 3",
            "num_attention_heads 4",
            "num_query_groups 2",
            "2 would work",
        ],
    ),
    (
        [
            "actor_rollout.infer_tensor_parallel_size=4",
            "actor_rollout.num_gpus_for_infer=4",
            "resource_pool.actor_rollout=[5]",
        ],
        [
            "actor_rollout.infer_tensor_parallel_size: 4 does not divide num_query_groups 2",
            "2 would work",
        ],
    ),
    (
        ["ref.tensor_model_parallel_size=4", "resource_pool.ref=[4]"],
        ["ref.tensor_model_parallel_size: 4 does not divide num_query_groups 2", "2 would work"],
    ),
    (
        [
            "actor_rollout.pipeline_model_parallel_size=3",
            "actor_rollout.num_gpus_for_train=3",
            "resource_pool.actor_rollout=[5]",
        ],
        ["actor_rollout.pipeline_model_parallel_size: 3 does not divide num_layers 4", "2 and 4"],
    ),
    (
        ["ref.pipeline_model_parallel_size=3", "resource_pool.ref=[3]"],
        ["ref.pipeline_model_parallel_size: 3 does not divide num_layers 4", "2 and 4"],
    ),
    (
        [
            "actor_rollout.pipeline_model_parallel_size=2",
            "actor_rollout.num_layer_list=[1,2]",
            "actor_rollout.num_gpus_for_train=2",
            "resource_pool.actor_rollout=[4]",
        ],
        ["actor_rollout.num_layer_list: [1, 2] has 3 layers", "the model has 4"],
    ),
    (
        [
            "actor_rollout.expert_model_parallel_size=2",
            "actor_rollout.num_gpus_for_train=2",
            "resource_pool.actor_rollout=[4]",
        ],
        ["actor_rollout.expert_model_parallel_size: 2", "the model has none", "1 would work"],
    ),
    # The template.
    (["training.prompt_type=qwen_r2"], ["training.prompt_type", "qwen_r2", "qwen_r1"]),
    (["training.prompt_type_path=/nowhere.json"], ["training.prompt_type", "/nowhere.json"]),
]


@pytest.mark.parametrize(
    "overrides, pieces", RULES, ids=[" ".join(overrides) for overrides, _ in RULES]
)
def test_rule(home: Path, overrides: list[str], pieces: list[str]) -> None:
    problems = told(home, *overrides)
    assert any(all(piece in problem for piece in pieces) for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


def test_named_neighbours_work(home: Path) -> None:
    for value in (24, 48):
        assert check(load(home, f"actor_rollout.ppo_mini_batch_size={value}")) == []
    assert check(load(home, "training.seq_length=256")) == []


def test_neither_replicas_nor_microbatches_must_divide_a_batch(home: Path) -> None:
    """2 rollout replicas; fewer prompts than replicas, and microbatches larger than a minibatch."""
    odd = ["actor_rollout.micro_batch_size=7", "ref.micro_batch_size=11"]
    for prompts in (1, 3, 5):
        sizes = [f"training.global_batch_size={prompts}", "actor_rollout.ppo_mini_batch_size=4"]
        assert check(load(home, *odd, *sizes)) == []


def test_neighbours_of_a_huge_batch_are_found_at_once(home: Path) -> None:
    began = time.process_time()
    problems = check(
        load(
            home,
            "training.global_batch_size=999996",
            "actor_rollout.n_samples_per_prompt=1000000",
            "actor_rollout.ppo_mini_batch_size=23",
        )
    )
    assert any("20 and 24 are the nearest" in problem for problem in problems), problems
    assert time.process_time() - began < 5


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_world_of_another_size_than_the_pool_is_refused(home: Path, world_size: int) -> None:
    problem = only(check(load(home), world_size))
    for piece in (f"{world_size} ranks", "need 4", "1 train + 2 rollout + 1 ref"):
        assert piece in problem


def test_world_of_one_has_all_roles(home: Path) -> None:
    cfg = load(home)
    assert check(cfg, 1) == []
    placed = placement(cfg, 1)
    assert placed.colocated and placed.roles_of(0) == ["train", "rollout", "ref"]
    (problem,) = check(load(home, "ref.tensor_model_parallel_size=2", "resource_pool.ref=[2]"), 1)
    assert "ref.tensor_model_parallel_size: 2 must be 1" in problem


def test_colocated_roles_span_the_world(home: Path) -> None:
    cfg = load(home, "resource_pool.colocate=true")
    assert cfg.world_size == 4 and check(cfg) == [] and check(cfg, 2) == []
    assert [span.size for span in placement(cfg, 4).grids] == [4, 4, 4]
    for name, overrides, size in (
        ("tiny", [], 1),
        ("qwen25_7b", ["actor_rollout.num_gpus_for_train=1"], 8),
    ):
        pool = [
            "resource_pool.colocate=true",
            "resource_pool.actor_rollout=null",
            "resource_pool.ref=null",
        ]
        # one replica of the largest role
        assert load_config(name, pool + overrides)[0].world_size == size


def test_tensor_parallel_group_must_not_cross_nodes(home: Path) -> None:
    cfg = load(home, "actor_rollout.infer_tensor_parallel_size=2")
    assert check(cfg, 4, [0, 0, 0, 1]) == []
    (problem,) = check(cfg, 4, [0, 0, 1, 1])  # rollout ranks are 1 and 2
    assert "rollout ranks [1, 2]" in problem and "nodes [0, 1]" in problem


def test_nodes_without_a_launcher(home: Path) -> None:
    assert nodes(load(home), 4) == [0, 0, 0, 0]
    assert nodes(load(home, "resource_pool.ranks_per_node=2"), 4) == [0, 0, 1, 1]
    assert (
        nodes(load_config("qwen25_7b", ["resource_pool.actor_rollout=[6, 8]"])[0], 16)
        == [0] * 8 + [1] * 8
    )


def test_model_file_must_agree_with_config_json(home: Path) -> None:
    wrong = {
        "num_layers": 5,
        "hidden_size": 64,
        "num_query_groups": 4,
        "rotary_base": 1000000,
        "add_qkv_bias": False,
        "max_position_embeddings": 512,
    }
    (home / "model" / "small.yaml").write_text(yaml.safe_dump({"small": MODEL | wrong}))
    problems = check(load(home))
    for key, right in (
        ("num_layers: 5", "4 would"),
        ("hidden_size: 64", "32 would"),
        ("num_query_groups: 4", "2 would"),
        ("rotary_base: 1000000.0", "10000.0 would"),
        ("add_qkv_bias: false", "true would"),
        ("max_position_embeddings: 512", "256 is the most"),
    ):
        assert any(f"model small: {key}" in problem and right in problem for problem in problems), (
            key
        )


def test_adapters_have_no_higher_rank_than_their_weights(home: Path) -> None:
    """hidden 32: qkv is 64 x 32, proj 32 x 32, fc1 96 x 32, fc2 32 x 48."""
    assert check(load(home, "actor_rollout.lora.rank=32")) == []
    problem = only(check(load(home, "actor_rollout.lora={rank: 33, targets: [fc2]}")))
    assert "actor_rollout.lora.rank: 33 is more than" in problem
    assert "fc2" in problem and "32 is the most" in problem


def test_experts_have_no_adapters(home: Path) -> None:
    experts = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "norm_topk_prob": True,
    }
    (home / "net" / "config.json").write_text(json.dumps(SHAPE | experts))
    refusal = "actor_rollout.lora.targets: ['qkv', 'fc1'] adapts the MLP"
    words = ["actor_rollout.lora={rank: 2, targets: [qkv, fc1]}"]
    assert any(problem.startswith(refusal) for problem in check(load(home, *words)))
    words = ["actor_rollout.lora={rank: 2, targets: [qkv, proj]}"]
    assert not any("lora" in problem for problem in check(load(home, *words)))


def test_latent_attention_has_no_adapters(home: Path) -> None:
    latent = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": SHAPE["num_attention_heads"],
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 8,
        "routed_scaling_factor": 1.0,
    }
    (home / "net" / "config.json").write_text(json.dumps(SHAPE | latent))
    refusal = "actor_rollout.lora.rank: 2 is not supported with the latent attention of"
    found = check(load(home, "actor_rollout.lora={rank: 2, targets: [proj]}"))
    assert any(problem.startswith(refusal) for problem in found), found


def test_model_file_may_shorten_the_positions(home: Path) -> None:
    keys = MODEL | {"max_position_embeddings": 90}
    (home / "model" / "small.yaml").write_text(yaml.safe_dump({"small": keys}))
    problem = only(check(load(home)))
    assert "training.seq_length: 96" in problem and "90 is the most" in problem


# -- files ---


def test_missing_model_folder(home: Path) -> None:
    cfg = load(home, f"actor_rollout.load={home}/nte")
    problem = only(check(cfg))
    for piece in ("actor_rollout.load", f"{home}/nte does not exist", "did you mean net?"):
        assert piece in problem
    assert check(cfg, absent_ok=True) == []


@pytest.mark.parametrize("name", ["tiny", "tiny_moe"])
def test_missing_tiny_model_names_the_tool(home: Path, name: str) -> None:
    problem = only(check(load(home, f"actor_rollout.load={home}/.cache/{name}/model")))
    assert f"python tools/make_tiny.py {name}`" in problem


def test_folder_without_config_json(home: Path) -> None:
    (home / "net" / "config.json").unlink()
    assert "config.json does not exist" in only(check(load(home)))
    assert "config.json does not exist" in only(check(load(home), absent_ok=True))


def test_folder_of_both_kinds_of_weights_is_ambiguous(home: Path) -> None:
    (home / "net" / "latest_checkpointed_iteration.txt").write_text("1")
    problem = only(check(load(home)))
    assert (
        "actor_rollout.load" in problem
        and "Megatron checkpoints" in problem
        and "Hugging Face" in problem
    )


def test_megatron_checkpoint_takes_its_shape_from_the_tokenizer_folder(home: Path) -> None:
    checkpoint = home / "ckpt"
    (checkpoint / "iter_0000003").mkdir(parents=True)
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("3")
    problem = only(
        check(
            load(
                home,
                f"actor_rollout.load={checkpoint}",
                f"training.tokenizer_name_or_path={home / 'net'}",
            )
        )
    )
    assert (
        "actor_rollout.load" in problem
        and "says 3, but" in problem
        and "holds no checkpoint" in problem
    )
    (checkpoint / "iter_0000003" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    for name in (".metadata", "common.pt", "__0_0.distcp"):
        (checkpoint / "iter_0000003" / name).write_text("not empty")
    overrides = [
        f"actor_rollout.load={checkpoint}",
        f"training.tokenizer_name_or_path={home / 'net'}",
    ]
    assert check(load(home, *overrides)) == []
    (home / "net" / "config.json").rename(home / "config.json")
    assert "config.json" in only(check(load(home, *overrides)))


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = weights()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found.pop("model.norm.weight"), "model.norm.weight is missing"),
        (
            lambda found: found.update({"model.norm.weight": np.zeros(8, np.float32)}),
            "model.norm.weight has the shape (8,) instead of (32,)",
        ),
        (
            lambda found: found.update({"model.norm.weight": np.zeros(32, np.int8)}),
            "model.norm.weight has the type I8 instead of one of BF16",
        ),
        (
            lambda found: found.update({"model.layers.9.mlp.up_proj.weight": np.zeros(3)}),
            "model.layers.9.mlp.up_proj.weight is unexpected",
        ),
        (
            lambda found: [found.update({f"module.{name}": found.pop(name)}) for name in [*found]],
            "are named module....",
        ),
    ],
)
def test_tensors_of_another_model_are_refused_before_anything_starts(
    home: Path, change: Callable[[dict[str, np.ndarray]], object], said: str
) -> None:
    rewrite(home / "net", change)
    assert said in only(check(load(home)))


def test_links_that_lead_nowhere_are_told_as_such(home: Path) -> None:
    (home / "later").symlink_to("not/mounted")
    assert "is a link to not/mounted, which does not exist" in only(
        check(load(home, f"actor_rollout.load={home}/later"))
    )
    (home / "a.parquet").symlink_to("a.parquet")
    assert "is a link to a.parquet, which does not exist" in only(
        check(load(home, f"actor_rollout.data_path={home}/a.parquet"))
    )
    (home / "net" / "model.safetensors").unlink()
    (home / "net" / "model.safetensors").symlink_to("../blobs/purged")
    assert "is a link to ../blobs/purged" in only(check(load(home)))


def test_json_files_are_read_as_they_lie_around(home: Path) -> None:
    """With the mark that Windows puts before them; not as what Git LFS left in their place."""
    config = home / "net" / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert check(load(home)) == []
    config.write_text(json.dumps(SHAPE | {"hidden_size": "32"}))
    assert 'hidden_size: "32" must be a whole number' in check(load(home))[0]
    config.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    assert "config.json is a pointer of Git LFS" in check(load(home))[0]


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_cut_off_weights(home: Path, keep: int) -> None:
    weights = home / "net" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    problem = only(check(load(home)))
    assert (
        "actor_rollout.load" in problem and str(weights) in problem and "copy it again" in problem
    )


@pytest.mark.parametrize(
    "content", [b"\xff" * 64, (9).to_bytes(8, "little") + b"[1, 2, 3]", b"PK" * 50]
)
def test_corrupt_weights(home: Path, content: bytes) -> None:
    (home / "net" / "model.safetensors").write_bytes(content)
    assert "no safetensors header" in only(check(load(home)))


def test_missing_shard_is_named(home: Path) -> None:
    net = home / "net"
    (net / "model.safetensors").rename(net / "model-00001-of-00002.safetensors")
    index = {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
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
    assert any(
        "ref.load" in problem and "64 rows" in problem and "128" in problem for problem in problems
    )


@pytest.mark.parametrize(
    "name, content, pieces",
    [
        ("gone.parquet", None, ["does not exist"]),
        ("empty.jsonl", "", ["has no rows"]),
        ("blank.jsonl", "\n\n", ["has no rows"]),
        ("empty.json", "[]", ["has no rows"]),
        ("bad.jsonl", '{"question": ', ["line 1: not valid JSON"]),
        ("bad.json", '{"question": "x"}', ["no column 'ground_truth_answer'; it has question"]),
        (
            "number.json",
            "7",
            ["must hold a JSON list of objects or one object a line, but holds int"],
        ),
        ("bad.parquet", "not parquet", ["cannot be read"]),
        ("data.bin", "x", ["ends in .parquet, .arrow, .jsonl, .json, .csv, .tsv"]),
        (
            "other.jsonl",
            '{"questions": "1?", "ground_truth_answer": "1"}',
            ["map_keys to the right ones", "no column 'question'", "did you mean questions?"],
        ),
        (
            "other.json",
            '[{"question": "1?", "label": "1"}]',
            ["map_keys to the right ones", "no column 'ground_truth_answer'", "question, label"],
        ),
    ],
)
def test_bad_data(home: Path, name: str, content: str | None, pieces: list[str]) -> None:
    if content is not None:
        (home / name).write_text(content)
    for key in ("actor_rollout.data_path", "training.eval_data_path"):
        problem = only(check(load(home, f"{key}={home / name}")))
        for piece in pieces:
            assert piece in problem
        assert name in problem and ("map_keys" in problem or problem.startswith(key))


@pytest.mark.parametrize(
    ("entry", "pieces"),
    [
        (
            "{path: gone.parquet}",
            ["training.evaluation.math.path: ", "gone.parquet does not exist"],
        ),
        (
            "{path: DATA, prompt_type: r1}",
            ["training.evaluation.math.prompt_type: ", "'r1' is not in"],
        ),
        (
            "{path: DATA, map_keys: {response: label}}",
            ["no column 'label'", "training.evaluation.math.map_keys"],
        ),
        ("{path: '1,DATA,2,DATA'}", ["training.evaluation.math.path: ", "is a blend"]),
        ("{path: ''}", ["training.evaluation.math.path: ", "it is empty"]),
    ],
)
def test_each_evaluation_set_is_looked_at(home: Path, entry: str, pieces: list[str]) -> None:
    entry = entry.replace("DATA", str(home / "train.parquet"))
    problem = only(check(load(home, f"training.evaluation.math={entry}")))
    for piece in pieces:
        assert piece in problem


def test_an_evaluation_set_is_not_called_like_a_score(home: Path) -> None:
    data = home / "train.parquet"
    problem = only(check(load(home, f"training.evaluation.reward={data}")))
    assert problem.startswith("training.evaluation.reward ") and "reward_set" in problem


def test_empty_parquet_and_missing_column(home: Path) -> None:
    nothing = pa.array([], pa.string())
    pq.write_table(
        pa.table({"question": nothing, "ground_truth_answer": nothing}), home / "train.parquet"
    )
    assert "has no rows" in only(check(load(home)))
    pq.write_table(pa.table({"question": ["x"], "answer": ["y"]}), home / "train.parquet")
    assert "has no column 'ground_truth_answer'" in only(check(load(home)))
    assert check(load(home, "training.map_keys.response=answer")) == []


# -- folders that are written ---


def test_folders_that_cannot_be_written_are_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "nowhere").symlink_to(home / "gone")
    (home / "circle").symlink_to(home / "circle")
    for key in ("output_dir", "actor_rollout.save"):
        for path in (
            f"{home}/base.yaml",
            f"{home}/base.yaml/below",
            f"{home}/nowhere",
            f"{home}/circle/below",
        ):
            assert f"{key}: {path} cannot be written" in only(check(load(home, f"{key}={path}")))
    monkeypatch.chdir(home / "net")
    for path in (".", "..", "''", "/"):
        assert "is the current directory or around it" in only(
            check(load(home, f"output_dir={path}"))
        )
    assert check(load(home, f"output_dir={home}/runs/new")) == [] and not (home / "runs").exists()


def test_names_too_long_for_a_file_system_are_refused(home: Path) -> None:
    for key in (
        "actor_rollout.load",
        "actor_rollout.data_path",
        "training.resume",
        "output_dir",
        "ref.load",
    ):
        with pytest.raises(BadInput, match="File name too long; name another path"):
            check(load(home, f"{key}={'x' * 300}"))


# -- custom scorers ---

MINE = """
import json, os, time
def good(cases): return [float(len(cases) == 2 and "1+1?" in case.prompt and case.gold == "2") for case in cases]
def tests(cases): return [json.loads(case.gold)["tests"] for case in cases]
def nan(cases): return [float("nan") for case in cases]
def dies(cases): os._exit(3)
"""


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("good", []),
        ("goods", ["mine.py has no goods; did you mean good?"]),
        (
            "tests",
            [
                "mine.tests fails on the first problem of",
                "train.parquet: TypeError: 'int' object is not",
            ],
        ),
        ("nan", ["mine.nan fails", "returned nan for response 0"]),
        ("dies", ["mine.dies fails", "its process ended with status 3"]),
    ],
)
def test_custom_scorers_are_tried_before_anything_starts(
    home: Path, name: str, pieces: list[str]
) -> None:
    (home / "mine.py").write_text(MINE)
    problems = check(load(home, f"algorithm.verifier_function=[format, '{home}/mine.py:{name}']"))
    assert len(problems) == bool(pieces)
    for problem in problems:
        assert problem.startswith("algorithm.verifier_function: ") and all(
            piece in problem for piece in pieces
        )


def test_custom_scorers_are_tried_on_preprocessed_data(home: Path, tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny / "model")
    prefix = home / "packed"
    with IndexedWriter([stem(prefix, "input_ids"), stem(prefix, "labels")]) as writer:
        writer.add(
            [
                np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
                for text in ("What is 11+12?", "23")
            ]
        )
    (home / "mine.py").write_text(
        "def score(cases): raise ValueError(repr((cases[0].prompt, cases[0].gold)))\n"
    )
    cfg = load(
        home,
        f"algorithm.verifier_function=[format, '{home}/mine.py:score']",
        f"actor_rollout.data_path={prefix}",
        f"training.tokenizer_name_or_path={tiny}/model",
    )
    assert "mine.score fails on the first problem of" in only(check_custom(cfg))
    assert "('What is 11+12?', '23')" in only(check_custom(cfg))
