"""LoRA on the train ranks against plain PyTorch on transformers, in every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.models import make_model
from support.multiproc import run_ranks
from support.updates import plain_pytorch, to_hf, update_body
from support.worlds import metrics, run

from r1zero.config.rules import check_keys
from r1zero.models.config import ModelConfig
from r1zero.models.lora import LoraConfig, adapter_table
from r1zero.models.params import param_table
from r1zero.policy.lora import initial_a
from r1zero.preflight.resolve import load_config

RANK = 4
SCALE = 3.0
LORA = [f"actor_rollout.lora.rank={RANK}", f"actor_rollout.lora.alpha={SCALE * RANK}"]
# Sums in another order: fp32 keeps about seven digits, and Adam divides by the gradient's own size.
TOLERANCE = 2e-5


class Adapted(torch.nn.Module):
    """A transformers model with adapters, whose weights are W + s B A in every call: another way to
    compute it than two products. Its parameters are the adapters alone."""

    def __init__(self, model: torch.nn.Module, targets: tuple[str, ...]) -> None:
        super().__init__()
        self.hidden = [model]  # in a list, so that its parameters are not this module's
        config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        self.shape = ModelConfig.from_config(config)
        lora = LoraConfig(rank=RANK, alpha=SCALE * RANK, targets=targets)
        self.table = adapter_table(self.shape, lora)
        self.a = torch.nn.ParameterList(initial_a(spec.a, 1) for spec in self.table)
        self.b = torch.nn.ParameterList()
        for spec in self.table:
            rows = sum(size[0] for size in spec.b.hf_shape)
            self.b.append(torch.zeros(rows, RANK))

    def merged(self) -> dict[str, torch.Tensor]:
        """The weights that calls are made with, by Hugging Face name."""
        [model] = self.hidden
        weights = dict(model.state_dict())
        for spec, a, b in zip(self.table, self.a, self.b, strict=True):
            for name, rows in zip(spec.weight.hf, to_hf(spec.b, b), strict=True):
                weights[name] = weights[name] + SCALE * rows @ a
        return weights

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        [model] = self.hidden
        return torch.func.functional_call(model, self.merged(), (tokens,), tie_weights=False)


def compare(model, found, weights, targets, epochs):
    adapted = Adapted(model, targets)
    expected = plain_pytorch(adapted, epochs)
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=1e-6)
    for spec, a, b in zip(adapted.table, adapted.a, adapted.b, strict=True):
        for name, value in ((spec.a.name, a), (spec.b.name, b)):
            assert value.norm() > 0
            error = (weights[name] - value).norm() / value.norm()
            assert error < TOLERANCE, f"{name} differs by {error:.1e} of its norm"
    merged = adapted.merged()
    for tensor in param_table(adapted.shape):
        for name, value in zip(tensor.hf, to_hf(tensor, weights[tensor.name]), strict=True):
            error = (value - merged[name]).norm() / merged[name].norm()
            assert error < TOLERANCE, f"{name}, merged, differs by {error:.1e} of its norm"


ALL = ("qkv", "proj", "fc1", "fc2")


@pytest.mark.parametrize(
    ("size", "layout", "overrides"),
    [
        (1, (1, 1), []),
        (1, (1, 1), ["actor_rollout.recompute_granularity=full"]),
        (2, (2, 1), ["actor_rollout.micro_batch_size=3"]),
        (
            2,
            (2, 1),
            [
                "actor_rollout.tensor_model_parallel_size=2",
                "training.sequence_parallel=true",
                "actor_rollout.recompute_granularity=full",
            ],
        ),
        (2, (1, 2), ["actor_rollout.micro_batch_size=2"]),
        (
            8,
            (2, 2),
            [
                "actor_rollout.tensor_model_parallel_size=2",
                "training.sequence_parallel=true",
                "actor_rollout.max_tokens_per_microbatch=64",
            ],
        ),
    ],
)
def test_six_updates_equal_plain_pytorch(tmp_path, size, layout, overrides):
    """Two passes, since B begins at zero, and with it the gradient of A."""
    model = make_model("qwen2_tied", tmp_path)
    keys = [*LORA, *overrides, "actor_rollout.ppo_epochs=2"]
    (losses, weights), *_ = run_ranks(update_body, size, str(tmp_path), layout, keys)
    assert len(losses) == 6
    compare(model, losses, weights, ALL, epochs=2)


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral", "olmo2"])
def test_each_family(tmp_path, family):
    """Cut by TP: olmo2 has a norm behind its row-parallel layers, which must see the adapter."""
    model = make_model(family, tmp_path)
    keys = [*LORA, "actor_rollout.ppo_epochs=2"]
    (losses, weights), *_ = run_ranks(update_body, 2, str(tmp_path), (2, 1), keys)
    compare(model, losses, weights, ALL, epochs=2)


def test_some_layers_alone(tmp_path):
    model = make_model("qwen2", tmp_path)
    keys = [*LORA, "actor_rollout.lora.targets=[proj, fc1]", "actor_rollout.ppo_epochs=2"]
    (losses, weights), *_ = run_ranks(update_body, 2, str(tmp_path), (1, 2), keys)
    compare(model, losses, weights, ("proj", "fc1"), epochs=2)
    assert not any("linear_qkv.adapter" in name for name in weights)


# Two steps of two updates, whose KL counts.
RUN = [
    *LORA,
    "training.train_iters=2",
    "training.eval_data_path=null",
    "training.global_batch_size=8",
    "actor_rollout.ppo_mini_batch_size=32",
    "actor_rollout.ppo_epochs=2",
    "actor_rollout.lr=1e-2",
    "algorithm.kl_ctrl.kl_coef=0.5",
    "reward.workers=1",
    "resource_pool.colocate=true",
]


@pytest.fixture(scope="module")
def with_ref_ranks(tiny, tmp_path_factory):
    """A run whose reference is a model of its own."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    return run(folder, 1, "tiny", [*RUN, "resource_pool.ref=[1]"])


@pytest.mark.parametrize(
    "layout",
    [
        [],
        [
            "actor_rollout.tensor_model_parallel_size=2",
            "actor_rollout.pipeline_model_parallel_size=2",
            "training.sequence_parallel=true",
        ],
    ],
    ids=["one rank", "TP2 PP2"],
)
def test_the_model_below_the_adapters_is_the_reference(with_ref_ranks, tmp_path, layout):
    """The same log-probs from another model, so the same is learnt, but for the order of sums."""
    size = 4 if layout else 1
    folder = run(tmp_path / "run", size, "tiny", [*RUN, *layout, "resource_pool.ref=[]"])
    for ours, theirs in zip(metrics(folder), metrics(with_ref_ranks), strict=True):
        assert ours["invariants/broken"] == 0
        assert ("time/wait/ref" in theirs) and ("time/wait/ref" not in ours)
        for key in ("kl", "loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), key
    assert ours["kl"] > 1e-3, "it counts"


def test_adapters_ask_for_no_ref_ranks(tiny):
    keys = ["resource_pool.ref=null", *LORA]
    cfg, warnings = load_config("tiny", keys)
    assert cfg.base_is_reference and not cfg.has_reference and cfg.world_size == 3
    assert any("ref.micro_batch_size" in line and "adapters" in line for line in warnings)
    free, _ = load_config("tiny", [*keys, "algorithm.kl_ctrl.kl_coef=0"])
    assert not free.base_is_reference and not free.has_reference
    named, _ = load_config("tiny", LORA)
    assert named.has_reference and not named.base_is_reference, "ranks that are named hold one"


def test_another_reference_needs_ranks(tiny, tmp_path):
    keys = [*LORA, f"ref.load={tmp_path}"]
    cfg, _ = load_config("tiny", [*keys, "resource_pool.ref=null"])
    [problem] = check_keys(cfg)
    assert "ref.load" in problem and "resource_pool.ref: [1]" in problem
    assert check_keys(load_config("tiny", keys)[0]) == []
