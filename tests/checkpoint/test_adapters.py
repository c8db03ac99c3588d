"""Runs with LoRA: what is published, saved, gone on from and exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.multiproc import run_ranks
from support.worlds import make_runtime, metrics, run, samples

from r1zero.checkpoint.resume import check_resume, find
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.lora import LoraConfig
from r1zero.models.params import FIRST, WHOLE, param_table
from r1zero.step import train_step
from r1zero.weights.open import open_weights

RANK = 4
ALPHA = 12.0
LORA = [f"actor_rollout.lora.rank={RANK}", f"actor_rollout.lora.alpha={ALPHA}"]
# Two updates a step, at a rate that stays, so a longer run begins as a shorter one.
RUN = [
    *LORA,
    "training.train_iters=4",
    "training.global_batch_size=4",
    "training.eval_data_path=",
    "training.publish_check_interval=1",
    "actor_rollout.lr=1e-2",
    "actor_rollout.lr_decay_style=constant",
    "actor_rollout.n_samples_per_prompt=4",
    "actor_rollout.ppo_mini_batch_size=8",
    "actor_rollout.micro_batch_size=2",
    "resource_pool.colocate=true",
]
TP2 = ["actor_rollout.tensor_model_parallel_size=2", "training.sequence_parallel=true"]
PP2 = ["actor_rollout.pipeline_model_parallel_size=2"]
TIMES = ("time/", "throughput/", "memory/", "publish/gigabytes")


def numbers(folder: Path) -> list[dict[str, float]]:
    """The metrics without what a clock measured."""
    return [
        {key: value for key, value in line.items() if not key.startswith(TIMES)}
        for line in metrics(folder)
    ]


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory) -> Path:
    """Four steps, saved after the second and the last."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    return run(folder, 2, "tiny", [*RUN, *TP2, "training.save_interval=2"])


def merged_by_hand(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Hugging Face weights of a base model with a PEFT folder's adapters, fp32."""
    weights = load_file(base / "model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    for name, b in tensors.items():
        if name.endswith("lora_B.weight"):
            a = tensors[name.replace("lora_B", "lora_A")]
            key = name.removeprefix("base_model.model.").replace("lora_B.", "")
            weights[key] = weights[key] + scale * b @ a
    return weights


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Within the rounding of fp32 products."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_the_model_is_the_base_with_the_adapters(straight, tiny):
    exported = load_file(straight / "model" / "model.safetensors")
    assert_same_weights(exported, merged_by_hand(tiny / "model", straight / "adapter"))
    base = load_file(tiny / "model" / "model.safetensors")
    layer = "model.layers.0."
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
        assert not torch.equal(exported[f"{layer}{name}.weight"], base[f"{layer}{name}.weight"])
    norm = f"{layer}input_layernorm.weight"
    assert torch.equal(exported[norm], base[norm])


def test_peft_loads_the_adapters(straight, tiny):
    peft = pytest.importorskip("peft", reason="peft is in the test extra")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, straight / "adapter").merge_and_unload()
    exported = AutoModelForCausalLM.from_pretrained(straight / "model", dtype=torch.float32)
    assert_same_weights(model.state_dict(), exported.state_dict())


def test_resume_is_exact(straight, tmp_path):
    folder = tmp_path / "run"
    keys = [*RUN, *TP2, "training.save_interval=2", "training.async_save=true"]
    run(folder, 2, "tiny", [*keys, "training.train_iters=2"])
    assert find(folder / "checkpoints", None).name == "iter_0000002"
    run(folder, 2, "tiny", keys)
    assert numbers(folder) == numbers(straight)
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes(), name


@pytest.mark.parametrize(
    ("size", "saved", "layout"),
    [(2, TP2, PP2), (4, PP2, TP2)],
    ids=["TP2 to PP2", "PP2 DP2 to TP2"],
)
def test_another_layout_goes_on_from_it(straight, tmp_path, size, saved, layout):
    """Sums in another order, so all is the same within float error."""
    first = straight
    if saved != TP2:
        short = ["training.train_iters=2", "training.save_interval=2"]
        first = run(tmp_path / "first", size, "tiny", [*RUN, *saved, *short])
    folder = tmp_path / "run"
    checkpoint = first / "checkpoints" / "iter_0000002"
    run(folder, 2, "tiny", [*RUN, *layout, f"training.resume={checkpoint}"])
    for ours, theirs in zip(metrics(folder), metrics(straight)[2:], strict=True):
        for key in ("loss", "kl", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), key
    for step in (3, 4):
        drawn = [row["response"] for row in samples(folder, step)]
        assert drawn == [row["response"] for row in samples(straight, step)]
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    expected = load_file(straight / "adapter" / "adapter_model.safetensors")
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-3 * value.norm(), name


def test_a_checkpoint_holds_what_learns_and_no_more(straight):
    """The model's own weights are those of the start."""
    size = sum(f.stat().st_size for f in straight.glob("checkpoints/iter_0000004/*.distcp"))
    adapters = (straight / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < 5 * adapters + 200_000  # weights, master weights and two moments; headers


def test_it_is_not_taken_for_a_model(straight, tiny):
    shape = ModelConfig.from_folder(tiny / "model")
    with pytest.raises(BadInput, match="holds adapters .* merged into model/"):
        open_weights(straight / "checkpoints" / "iter_0000004", shape)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (None, ["lora.rank 4", "has nothing"]),
        (LoraConfig(rank=8, alpha=ALPHA, targets=("qkv", "proj", "fc1", "fc2")), ["rank 4", "8"]),
        (LoraConfig(rank=RANK, alpha=8.0, targets=("qkv", "proj", "fc1", "fc2")), ["alpha 12.0"]),
        (LoraConfig(rank=RANK, alpha=ALPHA, targets=("qkv",)), ["targets ['qkv', 'proj'"]),
    ],
)
def test_other_adapters_are_refused(straight, tiny, lora, said):
    shape = ModelConfig.from_folder(tiny / "model")
    [problem] = check_resume(straight / "checkpoints", None, "model", shape, lora)
    for part in said:
        assert part in problem, problem
    assert "another output_dir" in problem


def test_the_same_adapters_are_not(straight, tiny):
    shape = ModelConfig.from_folder(tiny / "model")
    lora = LoraConfig(rank=RANK, alpha=ALPHA, targets=("qkv", "proj", "fc1", "fc2"))
    assert check_resume(straight / "checkpoints", None, "model", shape, lora) == []


def test_adapters_do_not_go_on_from_a_run_of_all_weights(tiny, tmp_path):
    once = ["training.train_iters=1", "training.save_interval=1", "actor_rollout.lora.rank=null"]
    folder = run(tmp_path / "run", 1, "tiny", [*RUN, *once, "actor_rollout.lora.alpha=null"])
    shape = ModelConfig.from_folder(tiny / "model")
    lora = LoraConfig(rank=RANK, alpha=ALPHA, targets=("qkv",))
    [problem] = check_resume(folder / "checkpoints", None, "model", shape, lora)
    assert "lora.rank nothing" in problem and "has 4" in problem
    assert not (folder / "adapter").exists()


def publishing(rank, size, store, folder, overrides):
    """Train a step; returns what the engine holds then, the adapters, and what checksums say before
    and after an adapter changes that is not published."""
    runtime = make_runtime(store, folder, *RUN, *overrides, rank=rank, size=size)
    try:
        runtime.start()
        train_step(1, runtime)
        held = {name: t.clone() for name, t in runtime.engine.weights().tensors.items()}
        learning = runtime.policy.adapter_parameters()
        adapters = {name: t.detach().clone() for name, t in learning.items()}
        before = runtime.publisher.difference()
        with torch.no_grad():
            next(iter(learning.values())).add_(1e-3)
        after = runtime.publisher.difference()
        return held, adapters, before, after
    finally:
        runtime.close()
        runtime.hold.release()


def test_engines_hold_the_base_with_the_adapters(tiny, tmp_path):
    """Bit for bit on one rank, whose product is the very same."""
    [(held, adapters, before, _)] = run_ranks(publishing, 1, tmp_path / "run", [])
    assert before is None
    shape = ModelConfig.from_folder(tiny / "model")
    table = param_table(shape)
    stream = open_weights(tiny / "model", shape).stream(table, FIRST, WHOLE, torch.float32)
    base = {spec.name: tensor.clone() for spec, tensor in stream}
    expected = dict(base)
    for name in [name for name in expected if ".linear_" in name and name.endswith("weight")]:
        stem = name.removesuffix("weight")
        a = adapters[f"{stem}adapter.a"]
        b = adapters[f"{stem}adapter.b"]
        expected[name] = torch.addmm(expected[name], b, a, alpha=ALPHA / RANK)
        assert not torch.equal(expected[name], base[name])
    assert held.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(held[name], value), name


def test_checksums_find_adapters_that_were_not_published(tiny, tmp_path):
    told = run_ranks(publishing, 2, tmp_path / "run", TP2)
    assert [before for *_, before, _ in told] == [None, None]
    for *_, (_, problem) in told:
        assert "linear_" in problem and "differs from train rank" in problem
