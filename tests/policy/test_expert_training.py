"""Mixtures of experts in the trainer against transformers, where the experts lie on one rank and on
several, in one and in several replicas."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from support.layouts import joined_parts, make_layouts
from support.models import file_tensors, make_model
from support.multiproc import DEVICE, run_ranks
from support.updates import compare, taught, to_hf

from r1zero.algo.lockstep import fill_up
from r1zero.algo.packing import TrainSample
from r1zero.distributed.placement import RoleSize
from r1zero.models.config import ModelConfig
from r1zero.models.params import param_table
from r1zero.policy.megatron import RoleModel
from r1zero.policy.pipeline import compute_logprobs, logprob_step, run_pipeline
from r1zero.policy.reference import Reference
from r1zero.types import Group, Prompt, Sample, joined

# Of four ranks; with TP, sequence parallelism. Where EP is less than the ranks of a stage, the same
# experts lie on several.
LAYOUTS = {
    "dp4_ep2": RoleSize(4, ep=2),
    "tp2": RoleSize(4, tp=2),
    "tp2_ep2": RoleSize(4, tp=2, ep=2),
    "tp2_ep4": RoleSize(4, tp=2, ep=4),
    "pp2_ep2": RoleSize(4, pp=2, ep=2, num_layer_list=(1, 3)),
    "tp2_pp2_ep2": RoleSize(4, tp=2, pp=2, ep=2, num_layer_list=(1, 3)),
}
ONE = {"one": RoleSize(1)}
TEMPERATURE = 0.8
# Largest difference, of log-probs and of a gradient in parts of the largest of its tensor. fp32 sums
# in another order give 2e-6.
TOLERANCE = 1e-5
LENGTHS = [(5, 7), (17, 3), (1, 20), (9, 2)]  # (prompt, first of two responses)


def items() -> list[TrainSample]:
    """Four prompts of two responses."""
    random = np.random.default_rng(3)
    found = []
    for position, (prompt_length, length) in enumerate(LENGTHS):
        prompt = Prompt(position, "", random.integers(3, 512, prompt_length, dtype=np.int32), "")
        for member in range(2):
            tokens = random.integers(3, 512, length + member, dtype=np.int32)
            sample = Sample(tokens, np.zeros(len(tokens), np.float32), False, 0)
            found.append(TrainSample(2 * position + member, position, prompt, sample))
    return found


def microbatches_of(grid):
    """A replica's share; the first replica has one microbatch less than the others."""
    every = items()
    replicas = grid.span.dp
    first = grid.replica * len(every) // replicas
    mine = every[first : first + len(every) // replicas]
    if grid.replica == 0:
        return fill_up([mine], 2)
    half = len(mine) // 2
    return [mine[:half], mine[half:]]


def passes_body(rank, size, store, folder, layouts, spoiled=()):
    """Log-probs and gradients in each layout, without and with recomputation; on weights with a mark
    of Megatron that is `spoiled`, if asked for."""
    world = make_layouts(rank, size, store, layouts)
    found = {}
    for name in layouts:
        for recompute in (False, True):
            model = loaded_model(world.roles[name], folder, recompute)
            for parameter in experts_of(model):
                for mark, value in spoiled:
                    setattr(parameter, mark, value)
            found[name, recompute] = looked_up_and_gradients(model)
    return found


def loaded_model(grid, folder, recompute):
    shape = ModelConfig.from_folder(folder)
    model = RoleModel(shape, grid, DEVICE, torch.float32, 128, True, recompute, seed=1)
    model.load(folder)
    return model


def experts_of(model):
    """This rank's weights of experts."""
    return [value for name, value in model.parameters().items() if "mlp.experts." in name]


def looked_up_and_gradients(model):
    """The log-probs of this replica's items, and the gradients of the mean of all of all replicas."""
    microbatches = microbatches_of(model.grid)
    looked_up = compute_logprobs(model, model.module, microbatches, TEMPERATURE)
    tokens = sum(len(item.sample.tokens) for item in items())

    def loss(batch, logprobs, entropy):
        return -logprobs.sum() / tokens, True

    with model.active():
        ddp = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True),
            model.module,
            pg_collection=model.groups,
        )
    ddp.zero_grad_buffer()
    last_step = logprob_step(model, TEMPERATURE, loss)
    run_pipeline(model, ddp, microbatches, last_step, backward=True)
    with model.active():
        finalize_model_grads([ddp], None, pg_collection=model.groups)
    gradients = {
        name: value.main_grad.clone()
        for name, value in model.parameters().items()
        if value.requires_grad
    }
    return looked_up, gradients


def with_references(family, folder):
    """A small model of transformers, its folder, and log-probs and gradients by it."""
    model = make_model(family, folder)
    tokens = sum(len(item.sample.tokens) for item in items())
    logprobs = {}
    for item in items():
        ids = torch.tensor(np.concatenate([item.prompt.tokens, item.sample.tokens])).long()
        start = len(item.prompt.tokens)
        logits = model(ids[None]).logits[0, start - 1 : -1] / TEMPERATURE
        found = logits.log_softmax(-1).gather(1, ids[start:, None])[:, 0]
        (-found.sum() / tokens).backward()
        logprobs[item.number] = found.detach().numpy()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return SimpleNamespace(
        model=model,
        folder=str(folder),
        shape=ModelConfig.from_folder(folder),
        logprobs=logprobs,
        gradients=file_tensors(gradients),
    )


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def moe(request, tmp_path_factory):
    """A small Qwen3-MoE; and a DeepSeek-V3: latent attention with YaRN, a dense layer, then experts in
    groups beside shared ones."""
    return with_references(request.param, tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def passes(moe):
    """What `passes_body` finds, by rank."""
    return run_ranks(passes_body, 4, moe.folder, LAYOUTS) + run_ranks(
        passes_body, 1, moe.folder, ONE
    )


def of_layout(passes, name):
    """The results of the ranks of a layout."""
    return passes[4:] if name in ONE else passes[:4]


def worst_gradient(moe, size, of_ranks):
    """(Largest error in parts of the largest element of its tensor, its name), over all tensors."""
    trained = [spec for spec in param_table(moe.shape) if not spec.fp32]
    whole = joined_parts(moe.shape, size, of_ranks)
    errors = []
    for spec in trained:
        for name, value in zip(spec.hf, to_hf(spec, whole[spec.name]), strict=True):
            expected = moe.gradients[name]
            error = (value - expected).abs().max() / (expected.abs().max() + 1e-12)
            errors.append((float(error), name))
    return max(errors)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", [*ONE, *LAYOUTS])
def test_logprobs_and_gradients_equal_transformers(moe, passes, name, recompute):
    results = [of_rank[name, recompute] for of_rank in of_layout(passes, name)]
    looked_up = {}
    for found, _ in results:
        looked_up |= found
    assert sorted(looked_up) == sorted(moe.logprobs)
    for number, expected in moe.logprobs.items():
        np.testing.assert_allclose(looked_up[number], expected, rtol=0, atol=TOLERANCE)
    size = {**ONE, **LAYOUTS}[name]
    error, where = worst_gradient(moe, size, [gradients for _, gradients in results])
    assert error < TOLERANCE, f"the gradient of {where} differs by {error:.1e} of its largest"


@pytest.mark.parametrize("family", ["qwen3_moe_mixed", "moonlight"])
def test_other_mixtures_at_two_ranks(tmp_path, family):
    """Layers without experts between those with some; and latent attention without a latent of queries,
    experts in one group."""
    mixed = with_references(family, tmp_path)
    size = RoleSize(2, tp=2, ep=2)
    found = run_ranks(passes_body, 2, mixed.folder, {"tp2_ep2": size})
    error, where = worst_gradient(mixed, size, [of_rank["tp2_ep2", True][1] for of_rank in found])
    assert error < TOLERANCE, f"the gradient of {where} differs by {error:.1e} of its largest"


def test_without_its_mark_experts_of_tp_ranks_learn_from_a_part_of_the_tokens(moe):
    """What megatron-core's own experts do at TP 2 and EP 1: the comparison above sees it."""
    layout = {"tp2": RoleSize(2, tp=2)}
    found = run_ranks(passes_body, 2, moe.folder, layout, [("allreduce", True)])
    gradients = [of_rank["tp2", False][1] for of_rank in found]
    with pytest.raises(AssertionError, match=r"has another decoder.layers.\d.mlp.experts"):
        worst_gradient(moe, layout["tp2"], gradients)


# -- updates --------------------------------------------------------------------------------------

OVERRIDES = [
    "actor_rollout.tensor_model_parallel_size=2",  # else sequence parallelism has no effect
    "training.sequence_parallel=true",
    "actor_rollout.max_tokens_per_microbatch=64",
]


def updates_body(rank, size, store, folder, layouts, dtype=torch.float32, marked=True):
    """Three updates in each layout: what they tell, and this rank's weights after them. Unless
    `marked`, Megatron is not told which parameters are cut."""
    if not marked:
        RoleModel._mark_cut_parameters = lambda model: None
    world = make_layouts(rank, size, store, layouts)
    found = {}
    for name in layouts:
        role = SimpleNamespace(train=world.roles[name])
        policy, stats = taught(role, folder, OVERRIDES, dtype=dtype)
        told = [(joined([s], "loss"), joined([s], "kl"), s.grad_norm) for s in stats]
        weights = {key: value.detach().clone() for key, value in policy.parameters().items()}
        found[name] = (told, weights)
    return found


@pytest.fixture(scope="module")
def learnt(moe):
    """What `updates_body` finds in all layouts, by rank."""
    return run_ranks(updates_body, 4, moe.folder, LAYOUTS)


def weights_of(moe, name, size, of_ranks):
    """The whole weights after the updates of a layout."""
    return joined_parts(moe.shape, size, [of_rank[name][1] for of_rank in of_ranks])


@pytest.mark.parametrize("name", LAYOUTS)
def test_three_updates_equal_plain_pytorch(moe, learnt, name):
    """Their gradients are cut off at a norm, so that one that is wrong shows in all weights."""
    told = learnt[0][name][0]
    weights = weights_of(moe, name, LAYOUTS[name], learnt)
    compare(copy.deepcopy(moe.model), told, weights)


TWO = {"tp2_ep2": RoleSize(2, tp=2, ep=2)}


def test_without_its_mark_the_norm_leaves_experts_out(moe, learnt):
    unmarked = run_ranks(updates_body, 2, moe.folder, TWO, torch.float32, False)
    norms = [of_ranks[0]["tp2_ep2"][0][0][2] for of_ranks in (learnt, unmarked)]
    assert norms[1] < 0.9 * norms[0]


def test_bf16_trains(moe, learnt):
    """As in fp32 but for rounding, and for routers that rounding makes decide otherwise."""
    found = run_ranks(updates_body, 2, moe.folder, TWO, torch.bfloat16)
    losses = [np.array(of_ranks[0]["tp2_ep2"][0])[:, 0] for of_ranks in (found, learnt)]
    np.testing.assert_allclose(*losses, rtol=0.03, atol=1e-3)
    weights = weights_of(moe, "tp2_ep2", TWO["tp2_ep2"], found)
    exact = weights_of(moe, "tp2_ep2", LAYOUTS["tp2_ep2"], learnt)
    in_fp32 = {spec.name for spec in param_table(moe.shape) if spec.fp32}
    for name, value in exact.items():
        assert weights[name].dtype == (torch.float32 if name in in_fp32 else torch.bfloat16)
        assert (weights[name].float() - value).norm() < 0.01 * value.norm(), name


# -- the reference --------------------------------------------------------------------------------


def reference_body(rank, size, store, folder):
    """Two replicas that share the experts; the second one is given one group, the first three."""
    world = make_layouts(rank, size, store, {"ref": RoleSize(2, ep=2)})
    grid = world.roles["ref"]
    reference = Reference(loaded_model(grid, folder, False), TEMPERATURE, 2, None)
    every = items()
    mine = every[:6] if grid.replica == 0 else every[6:]
    groups = [
        Group(first.position, first.prompt, [first.sample, second.sample])
        for first, second in zip(mine[::2], mine[1::2], strict=True)
    ]
    reference.add_logprobs(groups)
    reference.add_logprobs([])
    return {item.number: item.sample.ref_logprobs for item in mine}


def test_replicas_of_the_reference_share_experts(moe):
    """They have different numbers of microbatches, and would wait for each other."""
    first, second = run_ranks(reference_body, 2, moe.folder)
    for number, expected in moe.logprobs.items():
        found = (first | second)[number]
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
