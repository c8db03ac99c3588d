"""Optimizer offload: the numbers of an optimizer that stays, and no more on the device than visits."""

from __future__ import annotations

import torch
from support.models import make_model
from support.multiproc import run_ranks
from support.updates import taught
from support.worlds import make_world

from r1zero.policy import offload
from r1zero.policy.offload import master_of, visits
from r1zero.policy.optimizer import GroupStepAdamW

VISIT = 20_000  # elements: several visits, and tensors that are larger
OFFLOADED = ["training.optimizer_offload=true"]


def test_parameters_visit_in_their_order_and_a_large_one_alone():
    parameters = [torch.empty(size) for size in (3, 4, 9, 1, 2)]
    sizes = [[p.numel() for p in visit] for visit in visits(parameters, 7)]
    assert sizes == [[3, 4], [9], [1, 2]]
    assert list(visits([], 7)) == []


def three_updates(world, folder, dtype, overrides):
    """State and weights after three updates, what they told, and the elements of each visit."""
    policy, updates = taught(world, folder, overrides, dtype=dtype)
    adam = policy.optimizer.chained_optimizers[0].optimizer
    state = []
    for group in adam.param_groups:
        for parameter in group["params"]:
            moments = adam.state[parameter]
            state.append([master_of(parameter), moments["exp_avg"], moments["exp_avg_sq"]])
            if master_of(parameter) is not parameter:
                assert parameter.untyped_storage().nbytes() == 4, "it is still here"
                assert parameter.isnan().all()
    weights = [parameter.detach().clone() for parameter in policy.model.module.parameters()]
    norms = [update.grad_norm for update in updates if update is not None]
    return state, weights, norms


def stays_and_leaves(rank, size, store, folder, dtypes):
    """The same updates for each type by an optimizer that stays and by one that leaves, and the
    elements of each visit of the latter."""
    offload.OFFLOAD_VISIT_ELEMENTS = VISIT
    stepped = []
    step = GroupStepAdamW.step

    def noting(self):
        parameters = [p for group in self.param_groups for p in group["params"]]
        stepped.append(sum(parameter.numel() for parameter in parameters))
        step(self)

    GroupStepAdamW.step = noting
    world = make_world(rank, size, store, (1, 1))
    found = []
    for dtype in dtypes:
        stays = three_updates(world, folder, dtype, [])
        stepped.clear()
        found.append((stays, three_updates(world, folder, dtype, OFFLOADED), list(stepped)))
    return found


def test_the_numbers_are_those_of_an_optimizer_that_stays(tmp_path):
    make_model("qwen2", tmp_path)
    dtypes = [torch.bfloat16, torch.float32]
    for rank in run_ranks(stays_and_leaves, 2, str(tmp_path), dtypes):
        for stays, leaves, visited in rank:
            for expected, found in zip(stays[0], leaves[0], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(stays[1], leaves[1], strict=True))
            assert stays[2] == leaves[2]
            elements = [master.numel() for master, _, _ in leaves[0]]
            assert sum(visited) == 3 * sum(elements)
            assert len(visited) > 3 and max(visited) <= max(VISIT, *elements)
