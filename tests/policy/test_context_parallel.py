"""Context parallelism: log-probs, gradients and updates are those of transformers and plain PyTorch.

The segments here are short, and may be cut into small chunks.
"""

from __future__ import annotations

import copy
from datetime import timedelta

import numpy as np
import pytest
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from support.items import item
from support.models import make_model
from support.multiproc import DEVICE, run_ranks
from support.patience import LONG
from support.surrogates import SEQUENCE_CLIP
from support.updates import cases_body, compare

from r1zero.algo import zigzag
from r1zero.distributed.groups import World
from r1zero.distributed.launch import Launch
from r1zero.distributed.placement import RoleSize, place
from r1zero.models.config import ModelConfig
from r1zero.policy.megatron import RoleModel
from r1zero.policy.pipeline import compute_logprobs, logprob_step, run_pipeline

TEMPERATURE = 0.8
TOLERANCE = 1e-5
SIZE = 4
# Axes of the four ranks, one world having all of them; with TP sequences are cut over it, too.
LAYOUTS = {
    "cp4": {"cp": 4},
    "cp2_dp2": {"cp": 2},
    "tp2_cp2": {"tp": 2, "cp": 2},
    "cp2_pp2": {"cp": 2, "pp": 2},
}
EXPERT_LAYOUTS = {
    "cp2_dp2": {"cp": 2},
    "cp2_dp2_ep4": {"cp": 2, "ep": 4},
    "tp2_cp2_ep2": {"tp": 2, "cp": 2, "ep": 2},
    "cp2_pp2_ep2": {"cp": 2, "pp": 2, "ep": 2, "num_layer_list": (1, 3)},
}
LENGTHS = [(23, [41, 9]), (2, [60, 1]), (50, [3, 18])]  # of a prompt and its responses


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(zigzag, "SMALLEST_CHUNK", 3)


def items():
    random = np.random.default_rng(4)
    found = []
    for position, (prompt_length, lengths) in enumerate(LENGTHS):
        prompt = random.integers(3, 512, prompt_length)
        for length in lengths:
            found.append(item(len(found), position, prompt, random.integers(3, 512, length)))
    return found


def loss_of_response(logprobs, entropy):
    """Not a sum over tokens, as losses of whole responses are none."""
    return logprobs.mean().square() - 5 * entropy.mean()


def loss_of_microbatch(batch, logprobs, entropy):
    lengths = np.diff(batch.response_cu_seqlens).tolist()
    responses = zip(logprobs.split(lengths), entropy.split(lengths), strict=True)
    value = sum(loss_of_response(*response) for response in responses)
    return value, value.item()


def by_transformers(model, gradients):
    """Log-probs of every response; the gradients of the summed loss go into a folder, as weights of
    the model."""
    found = {}
    loss = 0.0
    for number, each in enumerate(items()):
        prompt_length = len(each.prompt.tokens)
        tokens = torch.tensor(np.concatenate([each.prompt.tokens, each.sample.tokens]))[None]
        logits = model(tokens).logits[0, prompt_length - 1 : -1] / TEMPERATURE
        all_logprobs = logits.log_softmax(-1)
        logprobs = all_logprobs.gather(1, tokens[0, prompt_length:, None])[:, 0]
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
        loss = loss + loss_of_response(logprobs, entropy)
        found[number] = logprobs.detach().numpy()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(gradients)
    return found


def layouts_body(rank, size, store, layouts, weights, gradients, recompute):
    """By layout, the log-probs and the error of every gradient, relative to its largest element."""
    sizes = {name: RoleSize(size, **axes) for name, axes in layouts.items()}
    launch = Launch("single", rank, size, 0, (0,) * size, "", 0)
    world = World(launch, place(sizes, colocate=True), DEVICE, timedelta(seconds=LONG), store)
    found = {}
    for name, grid in world.roles.items():
        model = loaded(grid, weights, recompute)
        mine = items()[grid.replica :: grid.span.dp]
        microbatches = [mine[:2], mine[2:]]
        logprobs = compute_logprobs(model, model.module, microbatches, TEMPERATURE)
        expected = loaded(grid, gradients, recompute).parameters()
        errors = {}
        for parameter, gradient in gradients_of(model, microbatches).items():
            difference = (gradient - expected[parameter]).abs().max()
            errors[parameter] = float(difference / expected[parameter].abs().max())
        found[name] = logprobs, errors
    return found


def loaded(grid, folder, recompute):
    shape = ModelConfig.from_folder(folder)
    model = RoleModel(shape, grid, DEVICE, torch.float32, 128, True, recompute, seed=1)
    model.load(folder)
    return model


def gradients_of(model, microbatches):
    """Gradients of this rank's parameters, added up over all ranks that have them."""
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    with model.active():
        ddp = DistributedDataParallel(
            model.config, ddp_config, model.module, pg_collection=model.groups
        )
        ddp.zero_grad_buffer()
    last_step = logprob_step(model, TEMPERATURE, loss_of_microbatch)
    run_pipeline(model, ddp, microbatches, last_step, backward=True)
    with model.active():
        finalize_model_grads([ddp], None, pg_collection=model.groups)
    trained = {name: value for name, value in model.parameters().items() if value.requires_grad}
    return {name: parameter.main_grad for name, parameter in trained.items()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("family", "layouts"),
    [("qwen2", LAYOUTS), ("qwen3_moe", EXPERT_LAYOUTS), ("deepseek_v3", EXPERT_LAYOUTS)],
    ids=["qwen2", "moe", "latent"],
)
def test_logprobs_and_gradients_equal_transformers(tmp_path, family, layouts, recompute):
    weights = tmp_path / "weights"
    gradients = tmp_path / "gradients"
    model = make_model(family, weights)
    expected = by_transformers(model, gradients)
    ranks = run_ranks(layouts_body, SIZE, layouts, str(weights), str(gradients), recompute)
    for layout in layouts:
        logprobs = {}
        for of_rank in ranks:
            found, errors = of_rank[layout]
            logprobs |= found
            assert max(errors.values()) < TOLERANCE, (layout, errors)
        for number, values in expected.items():
            np.testing.assert_allclose(logprobs[number], values, rtol=0, atol=TOLERANCE)


GSPO = [
    "algorithm.loss=gspo",
    f"algorithm.loss_settings={{clip_low: {SEQUENCE_CLIP}, clip_high: {SEQUENCE_CLIP}}}",
    "algorithm.aggregation=sequence_mean",
]
REJECTED = {"drawn_at": -6.2, "masked": True}
REJECTING = "algorithm.correction={reject: sequence, reject_low: 0.8, reject_high: 1.3}"


def within_geometric_mean(log_weights):
    return float(0.8 <= log_weights.mean().exp() <= 1.3)


# Keys, what the samples are like, and how plain PyTorch is told the same.
CASES = [
    ([], {}, {}),
    (
        [*GSPO, REJECTING],
        REJECTED,
        {
            "loss_name": "gspo",
            "aggregation": "sequence_mean",
            "weigh": within_geometric_mean,
            "chosen": REJECTED,
        },
    ),
]


def test_three_updates_equal_plain_pytorch(tmp_path):
    """Also where the loss looks at whole responses, which lie on several ranks."""
    overrides = ["training.sequence_parallel=true", "actor_rollout.max_tokens_per_microbatch=64"]
    model = make_model("qwen2", tmp_path)
    cases = [([*overrides, *keys], samples) for keys, samples, _ in CASES]
    found, *_ = run_ranks(cases_body, SIZE, str(tmp_path), (2, 1, 2), cases)
    for (losses, weights), (_, _, told) in zip(found, CASES, strict=True):
        compare(copy.deepcopy(model), losses, weights, **told)
