"""What a dry run says, against numbers worked out by hand."""

from __future__ import annotations

import ast
from inspect import signature

import numpy as np
import pytest
import torch
from support.shapes import small_shape

from r1zero.checkpoint import manager
from r1zero.config.load import CONFIGS
from r1zero.config.schema import ROOT, placement
from r1zero.distributed.placement import RankGrid, RoleSize, place
from r1zero.models import dtype
from r1zero.models.config import ModelConfig
from r1zero.policy import logprobs
from r1zero.preflight import dry_run, outputs
from r1zero.preflight import memory as estimates
from r1zero.preflight.checks import check
from r1zero.preflight.dry_run import (
    batch_line,
    memory_table,
    outlook_table,
    placement_table,
    report,
    roles_table,
)
from r1zero.preflight.found import look
from r1zero.preflight.memory import (
    CACHE_BLOCK,
    ESTIMATES,
    host_memory,
    layer_activations,
    memory,
    stage_parameters,
)
from r1zero.preflight.resolve import load_config
from r1zero.rollout import kv_cache
from r1zero.rollout.decoder import Decoder
from r1zero.rollout.engine import EngineLimits, NativeEngine
from r1zero.rollout.interface import Sampling
from r1zero.types import Batch, Prompt
from r1zero.weight_sync.broadcast import Publisher

QWEN_7B = 7_615_616_512  # parameters that the model's card and its index file state


def grid(tp: int, pp: int) -> RankGrid:
    """One replica."""
    return RankGrid.of("train", 0, tp * pp, tp, pp)


def shape_7b() -> ModelConfig:
    shape = look(load_config("qwen25_7b")[0]).actor.shape
    assert shape is not None
    return shape


def tiny_shape(**changes: object) -> ModelConfig:
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 4,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": 16,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_theta": 1e4,
    }
    return ModelConfig.from_config(config | changes)


def expert_shape(**changes: object) -> ModelConfig:
    """With eight experts in each layer."""
    experts = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    }
    return tiny_shape(**experts | changes)


def test_shape_of_the_model_file_has_the_parameters_of_the_real_model() -> None:
    assert shape_7b().num_parameters == QWEN_7B
    assert stage_parameters(shape_7b(), grid(1, 1), 0) == QWEN_7B


def test_stages_add_up_to_the_model() -> None:
    shape = shape_7b()
    assert sum(stage_parameters(shape, grid(1, 4), stage) for stage in range(4)) == QWEN_7B
    # Under TP only the norms, 2 a layer and the last, stand on both ranks.
    assert 2 * stage_parameters(shape, grid(2, 1), 0) == QWEN_7B + (2 * 28 + 1) * 3584


def test_last_stage_of_a_tied_model_holds_a_copy_of_the_embedding() -> None:
    shape = tiny_shape()
    whole = stage_parameters(shape, grid(1, 1), 0)
    assert whole == shape.num_parameters
    assert (
        stage_parameters(shape, grid(1, 2), 0) + stage_parameters(shape, grid(1, 2), 1)
        == whole + 16 * 8
    )


def test_memory_of_7b_by_hand() -> None:
    cfg, _ = load_config("qwen25_7b")
    found = memory(cfg, placement(cfg, 16), shape_7b(), shape_7b())
    # Layer: qkv 3584 x 4608 + 4608, output 3584^2, MLP 3 x 3584 x 18944, halved by TP2; two norms.
    layer = (3584 * 4608 + 4608 + 3584**2 + 3 * 3584 * 18944) // 2 + 2 * 3584
    last = 7 * layer + 152064 // 2 * 3584 + 3584
    train, rollout, ref = found["train"], found["rollout"], found["ref"]
    assert train.weights == 2 * 2 * last  # bf16, twice: 8 updates a step
    assert train.gradients == 4 * last
    assert train.optimizer == 12 * last  # one replica
    weights = 2 * (28 * layer + 2 * (152064 // 2 * 3584) + 3584)
    assert rollout.weights == ref.weights == weights
    # 3 replicas: 40 prompts of 2048 tokens, 160 responses of 2048 and a block of 128 that begins
    # with the rest of the prompt; keys and values of 28 layers x 2 heads x 128, bf16.
    assert rollout.kv_cache == (40 * 2048 + 160 * (2048 + 128)) * 2 * 28 * 2 * 128 * 2
    assert train.buckets == rollout.buckets == 4 * 64 * 2**20 and ref.buckets == 0
    assert ref.gradients == ref.optimizer == ref.kv_cache == 0


def test_memory_of_adapters_by_hand() -> None:
    """Gradients and optimizer are those of rank 16 adapters; the base weights lie there once."""
    cfg, _ = load_config("qwen25_7b", ["actor_rollout.lora.rank=16"])
    full, _ = load_config("qwen25_7b", ["actor_rollout.ppo_mini_batch_size=480"])  # no copy
    train = memory(cfg, placement(cfg, 16), shape_7b(), shape_7b())["train"]
    base = memory(full, placement(full, 16), shape_7b(), shape_7b())["train"].weights
    # Cut by TP2: B of qkv and of gate and up, A of the output and of down. Whole: the others.
    cut = 4608 + 3584 + 2 * 18944 + 18944
    whole = 4 * 3584
    adapters = 7 * 16 * (cut // 2 + whole)
    assert train.weights == base + 2 * 2 * adapters  # twice: 8 updates a step
    assert train.gradients == 4 * adapters
    assert train.optimizer == 12 * adapters


def test_an_offloaded_optimizer_by_hand() -> None:
    """On the device lies what visits: as much of the largest tensor, the embedding's half."""
    plain, _ = load_config("qwen25_7b")
    cfg, _ = load_config("qwen25_7b", ["training.optimizer_offload=true"])
    placed = placement(cfg, 16)
    before = memory(plain, placed, shape_7b(), shape_7b())["train"]
    found = memory(cfg, placed, shape_7b(), shape_7b())["train"]
    assert found.optimizer == 12 * (152064 // 2 * 3584)
    assert before.total - found.total == before.optimizer - found.optimizer
    table = memory_table(cfg, placed, shape_7b(), shape_7b())
    assert f"host memory of the optimizer: {before.optimizer / 1e9:.2f} GB a train rank" in table
    assert "host memory" not in memory_table(plain, placed, shape_7b(), shape_7b())


def test_routes_in_host_memory_by_hand() -> None:
    """48 layers x 8 experts; 512 responses of 32,768 tokens, all of them one replica's."""
    cfg, _ = load_config("qwen3_30b_a3b_32k")
    found = look(cfg)
    told = dry_run.report(found)
    assert host_memory(cfg, found.placement, found.actor.shape).routes == 512 * 32768 * 384
    assert "routing replay: on, 384 bytes a token" in told
    assert "host memory of routes: up to 6.44 GB on each train rank" in told
    free, _ = load_config("qwen3_30b_a3b_32k", ["actor_rollout.routing_replay=false"])
    assert "host memory" not in dry_run.report(look(free))


def test_layer_activations_by_hand() -> None:
    # 10 tokens, fp32: whole 6 x 8; cut 2 x qkv (24) + attention 8 + 4 x 12, halved by TP2.
    assert layer_activations(tiny_shape(), 2, 10, 4, False, 0) == 10 * 4 * (48 + 104 / 2)
    assert layer_activations(tiny_shape(), 2, 10, 4, True, 0) == 10 * 4 * (48 + 104) / 2


@pytest.mark.parametrize(
    "overrides, key, ratio",
    [
        (["training.bf16=false"], "gradients", 1.0),
        (["training.bf16=false"], "weights", 2.0),
        (["training.bf16=false"], "optimizer", 8 / 12),  # no master weight beside an fp32 weight
        (["actor_rollout.ppo_mini_batch_size=480"], "weights", 0.5),  # one update: no copy to keep
        (
            ["actor_rollout.num_gpus_for_train=16", "resource_pool.actor_rollout=[8, 8, 6]"],
            "optimizer",
            0.5,
        ),
    ],
)
def test_train_memory_follows_the_configuration(
    overrides: list[str], key: str, ratio: float
) -> None:
    base, _ = load_config("qwen25_7b")
    cfg, _ = load_config("qwen25_7b", overrides)
    before = memory(base, placement(base, base.world_size), shape_7b(), shape_7b())["train"]
    after = memory(cfg, placement(cfg, cfg.world_size), shape_7b(), shape_7b())["train"]
    assert getattr(after, key) == pytest.approx(ratio * getattr(before, key))


def test_context_parallel_ranks_share_tokens_and_optimizer() -> None:
    """A replica on four ranks: a fourth of the tokens, keys of all of them, optimizer in four parts."""
    shape = tiny_shape()
    cfg, _ = load_config("tiny", ["actor_rollout.micro_batch_size=4"])
    whole = RankGrid.of("train", 0, 1)
    cut = RankGrid.of("train", 0, 4, cp=4)
    one = ESTIMATES["train"](cfg, shape, whole, 0)
    four = ESTIMATES["train"](cfg, shape, cut, 0)
    assert four.weights == one.weights and four.gradients == one.gradients
    assert four.optimizer == one.optimizer / 4
    # 4 layers take 64 tokens of each of three others: a key and a value of 2 heads of 4, fp32
    gathered = 4 * 3 * 64 * 2 * 2 * 4 * 4
    tokens_only = one.activations - 16 * 8 * 4  # without the gradient of the output layer
    assert four.activations == tokens_only / 4 + 16 * 8 * 4 + gathered


def test_tensor_parallel_ranks_of_a_reference_share_tokens_where_there_are_experts() -> None:
    """Whatever train does, whose TP decides what the key of sequence parallelism is."""
    cfg, _ = load_config("tiny", ["training.sequence_parallel=true"])
    assert not cfg.training.sequence_parallel, "train has no TP"
    shape = expert_shape()
    tokens = cfg.ref.micro_batch_size * cfg.training.seq_length
    logits = 3 * 4 * tokens * shape.vocab_size / 2
    layer = layer_activations(shape, 2, tokens, 4, True, 0)
    found = ESTIMATES["ref"](cfg, shape, RankGrid.of("ref", 0, 2, tp=2), 0)
    assert found.activations == layer + logits


@pytest.mark.parametrize("role", ["ref", "rollout"])
def test_the_largest_layer_counts_where_some_have_experts(role: str) -> None:
    """Here those with experts keep more, and the first layer has none."""
    cfg, _ = load_config("tiny")
    one = RankGrid.of(role, 0, 1)
    all_layers = ESTIMATES[role](cfg, expert_shape(), one, 0)
    some = ESTIMATES[role](cfg, expert_shape(mlp_only_layers=[0, 2]), one, 0)
    assert some.activations == all_layers.activations
    none = ESTIMATES[role](cfg, tiny_shape(), one, 0)
    assert none.activations < some.activations


def test_the_tables_show_axes_that_some_role_has() -> None:
    sizes = {"train": RoleSize(8, tp=2, cp=2, ep=4), "rollout": RoleSize(2, tp=2)}
    placed = place(sizes, colocate=False)
    roles = [line.split() for line in roles_table(placed, [0] * 10).splitlines()]
    assert roles[0] == ["role", "ranks", "nodes", "TP", "PP", "DP", "CP", "EP"]
    assert roles[1] == ["train", "0-7", "0", "2", "1", "2", "2", "4"]
    ranks = [line.split() for line in placement_table(placed, [0] * 10).splitlines()]
    # Rank 6 is tp 0, cp 1, dp 1: number 6 of its stage, with the experts of index 2.
    assert ranks[1 + 6] == ["6", "0", "train", "0", "0", "1", "1", "2"]


def test_recomputation_saves_activations() -> None:
    kept = []
    for value in ("full", "null"):
        cfg, _ = load_config("qwen25_7b", [f"actor_rollout.recompute_granularity={value}"])
        kept.append(memory(cfg, placement(cfg, 16), shape_7b(), shape_7b())["train"].activations)
    assert kept[1] > 5 * kept[0]


def test_one_node_config_fits_its_npus_and_its_comment() -> None:
    cfg, _ = load_config("qwen25_7b_one_node")
    assert cfg.world_size == 8
    found = memory(cfg, placement(cfg, 8), shape_7b(), shape_7b())
    totals = {role: round(item.total / 1e9, 1) for role, item in found.items()}
    assert totals == {"train": 41.6, "rollout": 40.8, "ref": 19.6}
    comment = (CONFIGS / "qwen25_7b_one_node.yaml").read_text()
    assert all(f"= {total}" in comment for total in totals.values())
    assert all(total < 0.75 * 64 for total in totals.values())  # the rest for what is not counted


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_30b_a3b",
        "qwen3_30b_a3b_32k",
        "qwen25_7b_32k",
        "qwen3_235b_a22b",
        "moonlight_16b",
        "deepseek_v3_671b",
    ],
)
def test_large_configs_fit_devices_of_64_gigabytes(name: str) -> None:
    cfg, _ = load_config(name, ["actor_rollout.load=/nowhere", "ref.load=/nowhere"])
    found = look(cfg)
    assert found.placement is not None and found.actor.shape is not None
    needed = memory(cfg, found.placement, found.actor.shape, found.reference_shape)
    comment = (CONFIGS / f"{name}.yaml").read_text()
    for role, item in needed.items():
        gigabytes = item.total / 1e9
        assert f"= {gigabytes:.1f}" in comment, (role, gigabytes)
        assert gigabytes < 0.75 * 64, "the rest is for what is not counted"
    assert "not run on hardware" in " ".join(comment.replace("#", "").split())


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["actor_rollout.max_running_samples=2"],
        ["training.eval_data_path=null"],
        ["actor_rollout.max_tokens_to_oom=300"],
    ],
)
def test_the_engine_makes_room_for_no_more_than_the_estimate(overrides: list[str]) -> None:
    cfg, _ = load_config("tiny", overrides)
    shape = small_shape(ffn_hidden_size=192, vocab_size=320, max_positions=512)
    engine = NativeEngine(
        Decoder(shape, 1, None, torch.float32, torch.device("cpu"), cfg.training.seq_length),
        (2,),
        EngineLimits(
            cfg.response_budget,
            cfg.actor_rollout.max_tokens_to_oom,
            cfg.actor_rollout.max_running_samples,
            block=CACHE_BLOCK,
        ),
    )
    engine.version = 0
    prompts = [
        Prompt(index, "", np.zeros(cfg.actor_rollout.max_prompt_length, np.int32), "")
        for index in range(16)
    ]
    engine.submit(Batch(1, 0, prompts, 8, 64), range(0, 16, 2), Sampling(1.0, 1.0, 0, 0))
    held = 2 * engine._pool.keys.nbytes
    estimate = memory(cfg, placement(cfg, 4), shape, shape)["rollout"].kv_cache
    # one block in any case
    assert 0.5 * estimate <= held <= max(estimate, 2 * CACHE_BLOCK * 2 * 2 * 16 * 4)


@pytest.mark.parametrize(
    "overrides, line",
    [
        ([], "120 prompts x 4 = 480 samples -> 8 updates of 60 -> DP 1 x 30 microbatches of 2"),
        (
            ["actor_rollout.max_tokens_per_microbatch=9000", "actor_rollout.ppo_epochs=2"],
            "120 prompts x 4 = 480 samples -> 8 updates of 60 x 2 epochs -> DP 1 x microbatches "
            "of at most 9000 tokens",
        ),
        (
            [
                "actor_rollout.num_gpus_for_train=16",
                "actor_rollout.ppo_mini_batch_size=480",
                "actor_rollout.micro_batch_size=240",
                "resource_pool.actor_rollout=[22]",
            ],
            "120 prompts x 4 = 480 samples -> 1 update of 480 -> DP 2 x 1 microbatch of 240",
        ),
        (
            ["actor_rollout.micro_batch_size=7"],
            "120 prompts x 4 = 480 samples -> 8 updates of 60 -> DP 1 x 9 microbatches of at most 7",
        ),
    ],
)
def test_batch_line(overrides: list[str], line: str) -> None:
    cfg, _ = load_config("qwen25_7b", overrides)
    assert batch_line(cfg, placement(cfg, cfg.world_size)) == line


def test_placement_table_of_7b() -> None:
    cfg, _ = load_config("qwen25_7b")
    lines = placement_table(placement(cfg, 16), [rank // 8 for rank in range(16)]).splitlines()
    rows = [line.split() for line in lines]
    assert rows[0] == ["rank", "node", "role", "TP", "PP", "DP"] and len(rows) == 17
    assert rows[1 + 0] == ["0", "0", "train", "0", "0", "0"]
    assert rows[1 + 7] == ["7", "0", "train", "1", "3", "0"]
    assert rows[1 + 8] == ["8", "1", "rollout", "0", "0", "0"]
    assert rows[1 + 13] == ["13", "1", "rollout", "1", "0", "2"]
    assert rows[1 + 15] == ["15", "1", "ref", "1", "0", "0"]


def test_report_of_7b_works_without_its_weights() -> None:
    cfg, _ = load_config("qwen25_7b", ["actor_rollout.load=/nowhere/Qwen2.5-7B-Instruct"])
    assert check(cfg, absent_ok=True) == []
    text = report(look(cfg))
    assert "global_batch_size: 120" in text and "8 updates of 60" in text and "GB per rank" in text
    assert "not checked: /nowhere/Qwen2.5-7B-Instruct is not on this machine" in text
    assert text.count("/nowhere/Qwen2.5-7B-Instruct is taken from the model file qwen25-7b") == 1
    assert "does not exist" in "\n".join(check(cfg))  # a real run is refused


def test_report_in_a_world_of_one_shows_all_roles_and_their_sum() -> None:
    cfg, _ = load_config("smollm2_135m_gsm8k", ["actor_rollout.load=/nowhere/smol"])
    there = look(cfg, 1, [0])
    text = report(there)
    assert all(f"0        0  {role.rjust(7)}" in text for role in ("train", "rollout", "ref"))
    found = memory(cfg, placement(cfg, 1), there.actor.shape, there.reference.shape)
    assert (
        f"a rank has all roles: {sum(item.total for item in found.values()) / 1e9:.2f} GB" in text
    )


def test_memory_without_any_shape_says_so() -> None:
    cfg, _ = load_config("tiny", ["actor_rollout.load=/nowhere"])
    assert "not known here" in memory_table(cfg, placement(cfg, 4), None, None)


# -- one place for each size -----------------------------------------------------------------------


def sizes_by_name() -> dict[str, list[str]]:
    """Where in the package each constant of a size is assigned, by its name."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "r1zero").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            for target in node.targets if isinstance(node, ast.Assign) else ():
                name = getattr(target, "id", "")
                if name.isupper() and name.endswith(("_BYTES", "_BLOCK", "_ELEMENTS", "_FLIGHT")):
                    found.setdefault(name, []).append(path.name)
    return found


def test_no_size_is_written_down_twice() -> None:
    """A copy goes on telling the old value when its original moves."""
    assert {name: places for name, places in sizes_by_name().items() if len(places) > 1} == {}


def test_the_estimate_follows_what_the_parts_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert signature(Publisher).parameters["in_flight"].default == estimates.BUCKETS_IN_FLIGHT
    assert logprobs.LOGIT_CHUNK_ELEMENTS == estimates.LOGIT_CHUNK_ELEMENTS
    assert max(kv_cache.CPU_CACHE_BLOCK, kv_cache.NPU_CACHE_BLOCK) == estimates.CACHE_BLOCK
    assert outputs.OPTIMIZER_BYTES == manager.OPTIMIZER_BYTES == dtype.OPTIMIZER_BYTES
    assert dtype.OPTIMIZER_BYTES == dtype.MOMENT_BYTES + 4


# -- the time of a step ----------------------------------------------------------------------------


def test_the_outlook_says_that_it_is_a_guess() -> None:
    cfg, _ = load_config("qwen25_7b")
    lines = outlook_table(cfg, placement(cfg, 16), shape_7b()).splitlines()
    assert lines[0].split()[:2] == ["a", "step"] and "ref idle" in lines[0]
    assert lines[1].startswith("as it is ") and lines[1].count("%") == 3
    assert any(line.startswith("training.staleness: 1 ") for line in lines)
    assert "guess" in lines[-1] and "trust the order, not the seconds" in lines[-1]


def test_the_outlook_guesses_for_npus_only() -> None:
    cfg, _ = load_config("tiny", ["training.distributed_backend=gloo"])
    assert "for NPUs only" in outlook_table(cfg, placement(cfg, 4), tiny_shape())
    assert outlook_table(cfg, placement(cfg, 4), None) == ""
