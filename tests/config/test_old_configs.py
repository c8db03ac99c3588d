"""Configurations of the feature that this project succeeds load as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from support.small_config import only, write

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.family import family_of
from r1zero.preflight.checks import check
from r1zero.preflight.resolve import load_config

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
    assert (cfg.actor_rollout.lr, cfg.actor_rollout.adam_beta2, cfg.training.bf16) == (
        1e-6,
        0.95,
        True,
    )
    assert (
        cfg.model["qwen25-7b"]["rotary_base"] == 1000000.0
        and "norm_epsilon" not in cfg.model["qwen25-7b"]
    )
    told = "\n".join(warnings)
    for key in (
        "training.no_shared_storage",
        "training.no_load_optim",
        "training.no_load_rng",
        "training.is_instruction_dataset",
        "training.variable_seq_lengths",
        "training.dataset_additional_keys",
        "actor_rollout.num_samples_per_step",
        "actor_rollout.use_kv_cache",
        "actor_rollout.initial_loss_scale",
        "actor_rollout.finetune",
        "reward.model",
        "reward.tensor_model_parallel_size",
        "reward.load",
        "algorithm.lam",
        "algorithm.missing_eos_penalty",
        "model qwen25-7b: use_mc2",
        "model qwen25-7b: init_method_std",
    ):
        assert key in told, key
    for key in (
        "training.save_interval",
        "actor_rollout.save",
        "training.seq_length",
        "actor_rollout.lr:",
        "actor_rollout.max_tokens",
        "training.stage",
    ):
        assert key not in told, key
    assert all("accepted, no effect: " in warning for warning in warnings)


def test_other_keys_of_megatron_are_accepted_while_they_say_what_holds(old: Path) -> None:
    text = OLD.replace(
        "  bf16: true\n",
        "  bf16: true\n  "
        "fp16: false\n  "
        "rotary_percent: 1\n  "
        "log_interval: 1\n"
        "  overlap_grad_reduce: true\n",
    )
    cfg, warnings = load_config(write(old, "more", text))
    assert check(cfg, absent_ok=True) == []
    assert all(
        any(key in warning for warning in warnings)
        for key in ("log_interval", "overlap_grad_reduce")
    )
    with pytest.raises(BadInput, match="training.fp16: True is not supported, only False"):
        load_config(str(old / "more.yaml"), ["training.fp16=true"])


@pytest.mark.parametrize(
    "spelling", ["has-labels: true", "has_labels: true", "dataset_with_labels: true"]
)
def test_old_config_with_the_values_of_the_text(old: Path, spelling: str) -> None:
    text = OLD.replace("global_batch_size: 12", "global_batch_size: 120")
    text = text.replace("dataset_additional_keys: labels", spelling)
    text = text.replace("ppo_mini_batch_size: 12", "ppo_mini_batch_size: 60").replace(
        "[8, 6]", "[6,8]"
    )
    cfg, warnings = load_config(write(old, "text", text))
    assert check(cfg, absent_ok=True) == [] and cfg.updates_per_step == 8
    assert any(spelling.split(":")[0].replace("-", "_") in warning for warning in warnings)


# What a script of MindSpeed-LLM for Qwen3-MoE says beside the sizes.
EXPERTS = """
  num_experts: 8
  moe_router_topk: 2
  moe_ffn_hidden_size: 64
  moe_layer_freq: -1
  moe_router_pre_softmax: true
  norm_topk_prob: true
  n_shared_experts: 0
  moe_grouped_gemm: true
  moe_permutation_async_comm: true
  moe_token_dispatcher_type: alltoall
  moe_router_load_balancing_type: none
  moe_aux_loss_coeff: 0.0
  moe_tp_extend_ep: false
  expert_tensor_parallel_size: 1
  context_parallel_algo: ulysses_cp_algo
  use_cp_send_recv_overlap: true
  swap_optimizer: false
"""


def of_experts(old: Path, keys: str = EXPERTS) -> str:
    """A configuration whose model file has keys of experts, beside a folder with that model."""
    text = OLD_MODEL.replace("add_qkv_bias: true", "add_qkv_bias: false\n  qk_layernorm: true")
    (old / "model" / "qwen25-7b.yaml").write_text(text + keys)
    return write(old, "experts", OLD.replace("./ckpt", str(old / "net")))


def test_keys_of_experts_are_accepted_while_they_say_what_holds(old: Path) -> None:
    path = of_experts(old)
    cfg, warnings = load_config(path)
    assert check(cfg, absent_ok=True) == []
    network = cfg.model["qwen25-7b"]
    assert (network["moe_layer_freq"], network["norm_topk_prob"]) == (-1, True)
    told = "\n".join(warnings)
    for key in ("moe_grouped_gemm", "moe_permutation_async_comm", "moe_token_dispatcher_type"):
        assert key in told
    assert "context_parallel_algo" in told and "use_cp_send_recv_overlap" in told


def test_ways_of_megatron_to_say_the_same_agree_with_config_json(old: Path) -> None:
    of_experts(old)
    keys = yaml.safe_load((old / "model" / "qwen25-7b.yaml").read_text())["qwen25-7b"]
    network = ModelConfig.from_megatron(keys)
    (old / "net").mkdir()
    (old / "net" / "config.json").write_text(
        json.dumps(
            family_of(network).hf_from_megatron(keys) | {"architectures": ["Qwen3MoeForCausalLM"]}
        )
    )

    def disagreeing(keys: str) -> list[str]:
        cfg, _ = load_config(of_experts(old, keys))
        return [problem for problem in check(cfg) if "config.json says" in problem]

    assert disagreeing(EXPERTS) == []
    for layers in ("1", str([1] * 28)):
        assert disagreeing(EXPERTS.replace("freq: -1", f"freq: {layers}")) == []
    for layers in ("2", str([0] + [1] * 27), "[1]"):
        problem = only(disagreeing(EXPERTS.replace("freq: -1", f"freq: {layers}")))
        assert f"moe_layer_freq: {layers} is not what" in problem
    problem = only(disagreeing(EXPERTS.replace("norm_topk_prob: true", "norm_topk_prob: false")))
    assert "moe_router_pre_softmax: true is not what" in problem


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("expert_tensor_parallel_size=2", "experts are whole: expert_model_parallel_size shares"),
        ("moe_tp_extend_ep=true", "experts are whole"),
        ("moe_router_load_balancing_type=aux_loss", "would pull against the reward"),
        ("moe_aux_loss_coeff=0.001", "would pull against the reward"),
        ("n_shared_experts=1", "all routed"),
        ("swap_optimizer=true", "say training.optimizer_offload: true"),
    ],
)
def test_what_experts_cannot_be_is_refused_with_the_reason(
    old: Path, override: str, reason: str
) -> None:
    path = of_experts(old)
    with pytest.raises(BadInput) as refused:
        load_config(path, [f"training.{override}"])
    problem = only(str(refused.value).splitlines())
    assert "is not supported, only" in problem and reason in problem


@pytest.mark.parametrize("layers", ["0", "true", "[1, 2]", "half"])
def test_layers_with_experts_are_a_number_or_a_list(old: Path, layers: str) -> None:
    path = of_experts(old, EXPERTS.replace("freq: -1", f"freq: {layers}"))
    with pytest.raises(BadInput, match="moe_layer_freq: .* must be 1, N for every Nth layer, or"):
        load_config(path)


def test_old_reason_config_loads(old: Path) -> None:
    text = OLD
    for before, after in (
        ("global_batch_size: 12", "global_batch_size: 4"),
        ("ppo_mini_batch_size: 12", "ppo_mini_batch_size: 4"),
        ("n_samples_per_prompt: 4", "n_samples_per_prompt: 2"),
        ("for_train: 8", "for_train: 4"),
        ("for_infer: 6", "for_infer: 2"),
        ("max-tokens-to-oom: 1000000", "max-tokens-to-oom: 999999"),
        (
            "additional_keys: labels",
            "additional_keys: labels categories\n  dataset_category: 1\n  no_save_optim: true\n"
            "  no_save_rng: true",
        ),
        (
            "    tensor_model_parallel_size: 2\n    pipeline_model_parallel_size: 4",
            "    tensor_model_parallel_size: 1\n    pipeline_model_parallel_size: 4",
        ),
        (
            "    tensor_model_parallel_size: 2\n    pipeline_model_parallel_size: 1",
            "    tensor_model_parallel_size: 1\n    pipeline_model_parallel_size: 1",
        ),
        ("[8, 6]", "[6]"),
        ("ref: [2]", "ref: [1]"),
        ('["acc", "format"]', '["acc"]'),
        ("[0.5, 0.5]", "[1.0]"),
    ):
        assert before in text
        text = text.replace(before, after)
    cfg, warnings = load_config(write(old, "grpo_trainer_qwen25_7b_reason", text))
    assert check(cfg, absent_ok=True) == []
    assert cfg.training.sequence_parallel is False
    assert any(
        "training.sequence_parallel" in warning and "tensor_model_parallel_size is 1" in warning
        for warning in warnings
    )
    assert any("training.no_save_optim" in warning for warning in warnings)


def test_old_llama_config_loads_with_its_reward_model(old: Path) -> None:
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
    config["training"] |= {
        "global_batch_size": 4,
        "seq_length": 512,
        "train_iters": 1000,
        "save_interval": 10000,
        "no_shuffle": True,
        "sequence_parallel": False,
    }
    actor = config["actor_rollout_ref"]["actor_rollout"]
    actor |= {
        "micro_batch_size": 1,
        "ppo_mini_batch_size": 1,
        "num_samples_per_step": 1,
        "max_prompt_length": 256,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "pad_to_multiple_of": 1,
        "num_gpus_for_train": 1,
        "num_gpus_for_infer": 1,
    }
    config["actor_rollout_ref"]["ref"]["tensor_model_parallel_size"] = 1
    config["reward"] = {"model": "llama32-1b", "micro_batch_size": 4, "load": "./ckpt"}
    del config["algorithm"]["verifier_function"], config["algorithm"]["verifier_weight"]
    config["resource_pool"] = {"actor_rollout": [2], "ref": [1], "reward": [1]}
    path = write(old, "grpo_trainer_llama32_1b", yaml.safe_dump(config))
    cfg, warnings = load_config(path)
    assert cfg.has_reward_model and cfg.reward.load == "./ckpt"
    assert not cfg.reward.verifier, "its reward is the model's: it names no reward function"
    assert load_config(path, ["algorithm.verifier_function=[acc]"])[0].reward.verifier
    assert cfg.actor_rollout.lr == 1e-7 and cfg.algorithm.verifier_function == ["acc"]
    assert any("pad_to_multiple_of" in warning for warning in warnings)
    assert check(cfg, absent_ok=True) == []
