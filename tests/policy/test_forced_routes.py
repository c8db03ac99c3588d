"""Training with routes that no router would choose, against transformers whose routers are forced alike."""

from __future__ import annotations

import copy
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.models import make_model
from support.multiproc import DEVICE, run_ranks
from support.patience import LONG

# isort: split
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

from r1zero.algo.packing import TrainSample
from r1zero.distributed.groups import World
from r1zero.distributed.launch import Launch
from r1zero.distributed.placement import RoleSize, place
from r1zero.models.config import ModelConfig
from r1zero.models.params import ShardIndex, Shards, Stages, stage_params
from r1zero.policy.megatron import RoleModel
from r1zero.policy.pipeline import compute_logprobs, logprob_step, run_pipeline
from r1zero.types import Prompt, Sample
from r1zero.weights.open import open_weights

TEMPERATURE = 0.8
TOLERANCE = 1e-5  # of log-probs, and of a gradient in parts of the largest of its tensor
LENGTHS = [(5, 7), (17, 3), (1, 20), (9, 1)]  # (prompt, first of two responses)
EXPERTS, TOP_K, LAYERS = 8, 3, 4

ONE = {"one": RoleSize(1)}
# Of four ranks; with TP, sequence parallelism: tokens fill up the microbatches then.
LAYOUTS = {
    "dp4_ep2": RoleSize(4, ep=2),
    "tp2_pp2_ep2": RoleSize(4, tp=2, pp=2, ep=2, num_layer_list=(1, 3)),
    "tp2_cp2_ep2": RoleSize(4, tp=2, cp=2, ep=2),
}


def random_routes(random: np.random.Generator, tokens: int) -> np.ndarray:
    """Distinct experts of each token and layer, uint8 [tokens, layers, k]."""
    order = random.random((tokens, LAYERS, EXPERTS)).argsort(axis=-1)
    return order[..., :TOP_K].astype(np.uint8)


def items() -> list[TrainSample]:
    """Four prompts of two responses, whose tokens went to random experts."""
    random = np.random.default_rng(3)
    found = []
    for position, (prompt_length, length) in enumerate(LENGTHS):
        prompt = Prompt(position, "", random.integers(3, 512, prompt_length, dtype=np.int32), "")
        of_prompt = random_routes(random, prompt_length)
        for member in range(2):
            tokens = random.integers(3, 512, length + member, dtype=np.int32)
            sample = Sample(tokens, np.zeros(len(tokens), np.float32), False, 0)
            sample.routes = random_routes(random, len(tokens) - 1)
            number = 2 * position + member
            found.append(TrainSample(number, position, prompt, sample, of_prompt))
    return found


def forced_body(rank, size, store, folder, gradients, layouts):
    """By layout, without and with recomputation: this rank's log-probs, its worst gradient, and how
    routers agree with what they replay."""
    launch = Launch("single", rank, size, 0, (0,) * size, "", 0)
    world = World(launch, place(layouts, colocate=True), DEVICE, timedelta(seconds=LONG), store)
    found = {}
    for name, grid in world.roles.items():
        for recompute in (False, True):
            shape = ModelConfig.from_folder(folder)
            model = RoleModel(shape, grid, DEVICE, torch.float32, 128, True, recompute, seed=1)
            model.load(folder)
            found[name, recompute] = forced(model, open_weights(gradients, shape))
    return found


def forced(model, gradients):
    """What `forced_body` finds with one model."""
    every = items()
    share = len(every) // model.grid.span.dp
    mine = every[model.grid.replica * share :][:share]
    half = len(mine) // 2
    microbatches = [mine[:half], mine[half:]]
    logprobs = compute_logprobs(model, model.module, microbatches, TEMPERATURE)
    with model.router_agreement.counting(with_gradients=True):
        learn(model, microbatches)
    agreement = model.router_agreement.take().tolist()
    return logprobs, worst_gradient(model, gradients), agreement


def learn(model, microbatches) -> None:
    """Gradients of the mean over the tokens of all replicas."""
    tokens = sum(len(item.sample.tokens) for item in items())

    def loss(batch, logprobs, entropy):
        return -logprobs.sum() / tokens, None

    with model.active():
        ddp = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True),
            model.module,
            pg_collection=model.groups,
        )
    model.config.finalize_model_grads_func = None
    ddp.zero_grad_buffer()
    last_step = logprob_step(model, TEMPERATURE, loss)
    run_pipeline(model, ddp, microbatches, last_step, backward=True)
    with model.active():
        finalize_model_grads([ddp], None, pg_collection=model.groups)


def worst_gradient(model, gradients) -> tuple[float, str]:
    """The largest error of this rank's gradients, and where it is."""
    grid = model.grid
    stages = Stages.of(model.shape.num_layers, grid.span)
    held = stage_params(model.shape, grid.stage, stages)
    index = ShardIndex(grid.tp_index, grid.expert_index)
    parameters = model.parameters()
    errors = []
    for spec, expected in gradients.stream(held, index, Shards.of_grid(grid.span), torch.float32):
        error = (parameters[spec.name].main_grad - expected).abs().max() / (
            expected.abs().max() + 1e-12
        )
        errors.append((float(error), spec.name))
    return max(errors)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Log-probs by a forced model of transformers, its folder, and one that has its gradients as
    weights."""
    folder = tmp_path_factory.mktemp("moe")
    model = make_model("qwen3_moe", folder)
    forced_model = copy.deepcopy(model)
    routes: list[torch.Tensor] = []
    for layer, block in enumerate(forced_model.model.layers):
        force(block.mlp.gate, layer, routes)
    tokens = sum(len(item.sample.tokens) for item in items())
    logprobs = {}
    for item in items():
        of_prompt, own = item.routes
        routes[:] = [torch.from_numpy(np.concatenate([of_prompt, own])).long()]
        ids = torch.tensor(np.concatenate([item.prompt.tokens, item.sample.tokens])).long()
        start = len(item.prompt.tokens)
        logits = forced_model(ids[None, :-1]).logits[0, start - 1 :] / TEMPERATURE
        found = logits.log_softmax(-1).gather(1, ids[start:, None])[:, 0]
        (-found.sum() / tokens).backward()
        logprobs[item.number] = found.detach().numpy()
    with torch.no_grad():
        for target, source in zip(model.parameters(), forced_model.parameters(), strict=True):
            target.copy_(source.grad)
    gradients = tmp_path_factory.mktemp("gradients")
    model.save_pretrained(gradients)
    return SimpleNamespace(folder=str(folder), gradients=str(gradients), logprobs=logprobs)


def force(gate, layer: int, routes: list[torch.Tensor]) -> None:
    """Let a router of transformers weigh the experts of `routes` [0], [T, layers, k]."""

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        logits = F.linear(hidden.float(), gate.weight.float())
        ids = routes[0][:, layer]
        return logits, logits.gather(1, ids).softmax(-1), ids

    gate.forward = forward


@pytest.fixture(scope="module")
def found(reference):
    """What `forced_body` finds, by layout and recomputation, of all ranks."""
    by_name = {}
    for layouts, size in ((ONE, 1), (LAYOUTS, 4)):
        results = run_ranks(forced_body, size, reference.folder, reference.gradients, layouts)
        for key in results[0]:
            by_name[key] = [of_rank[key] for of_rank in results]
    return by_name


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", [*ONE, *LAYOUTS])
def test_random_routes_are_computed_as_transformers_does(reference, found, name, recompute):
    logprobs = {}
    for of_rank, (error, where), _ in found[name, recompute]:
        logprobs |= of_rank
        assert error < TOLERANCE, f"the gradient of {where} differs by {error:.1e} of its largest"
    assert sorted(logprobs) == sorted(reference.logprobs)
    for number, expected in reference.logprobs.items():
        np.testing.assert_allclose(logprobs[number], expected, rtol=0, atol=TOLERANCE)


def test_agreement_is_counted_once_on_every_layout(found):
    """Of all response tokens and layers; random routes are rarely those of a router, but the same
    ones everywhere."""
    tokens = sum(len(item.sample.tokens) for item in items())
    counts = {
        key: np.sum([agreement for *_, agreement in of_ranks], axis=0).tolist()
        for key, of_ranks in found.items()
    }
    [same] = {tuple(count) for count in counts.values()}
    assert same[1] == tokens * LAYERS
    assert 0 < same[0] < same[1] / 5
