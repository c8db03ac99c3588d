"""The control plane beside an adaptor that replaces functions of torch.distributed, over real gloo.

MindSpeed is not here; this does what it does. While its adaptor is imported, every attribute of a
module that is the function becomes a wrapper of it, and that of all_reduce (core_r0.16.0) sums a
float32 copy of a float64 tensor.
"""

from __future__ import annotations

import re
import sys
import textwrap
import types
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.models import make_model
from support.multiproc import DEVICE, run_ranks
from support.patience import LONG
from support.updates import compare, update_body

from r1zero.distributed.collectives import (
    all_max,
    all_sum,
    gather_objects,
    isend_bytes,
    isend_object,
    recv_bytes,
    recv_object,
)
from r1zero.distributed.groups import World
from r1zero.distributed.launch import Launch
from r1zero.distributed.megatron_on_npu import import_mindspeed
from r1zero.distributed.placement import RoleSize, place
from r1zero.distributed.transfer import RoleTransfer
from r1zero.policy.handover import Giver, Taker
from r1zero.types import Batch, Group, Prompt, Sample

ROOT = Path(__file__).resolve().parents[2]
# What goes over the device's own backend.
TENSOR_PLANE = {
    "policy/logprobs.py",
    "policy/reference.py",
    "ops/token_gather.py",
    "ops/vocab.py",
    "rollout/decoder.py",
    "rollout/expert_replicas.py",
    "rollout/routes.py",
    "rollout/sampler.py",
    "weight_sync/broadcast.py",
    "distributed/device.py",
}
CALL = re.compile(
    r"\b(?:dist|distributed)\.(?:i?send|i?recv|barrier|(?:all_)?(?:reduce|gather|broadcast|scatter)\w*)\("
)

ADAPTOR = """
    import functools, sys
    import torch
    import torch.distributed as dist

    def replace(name, wrapper):
        function = getattr(dist, name)
        replaced = wrapper(function)
        for module in list(sys.modules.values()):
            if getattr(module, name, None) is function:
                setattr(module, name, replaced)
"""
LOSES_FLOAT64 = (
    ADAPTOR
    + """
    def loses_float64(function):
        @functools.wraps(function)
        def wrapper(tensor, *args, **kwargs):
            if tensor.dtype != torch.float64:
                return function(tensor, *args, **kwargs)
            work = function(tensor.float(), *args, **kwargs)
            return work.wait() if work else None
        return wrapper

    replace("all_reduce", loses_float64)
"""
)
# What another release, or another library, might replace.
FOR_DEVICES_ONLY = (
    ADAPTOR
    + """
    def for_devices_only(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            raise AssertionError(f"{function.__name__} of an adaptor for devices was called")
        return wrapper

    for name in ("all_reduce", "reduce", "broadcast", "barrier", "send", "recv", "isend", "irecv", "all_gather",
                 "gather", "scatter", "all_gather_object", "gather_object", "broadcast_object_list"):
        replace(name, for_devices_only)
"""
)


def adapt(folder, text):
    """Import this adaptor as the NPU path imports MindSpeed's; only ever in a process that ends
    with the test."""
    (folder / "mindspeed").mkdir(exist_ok=True)
    (folder / "mindspeed" / "__init__.py").touch()
    (folder / "mindspeed" / "megatron_adaptor.py").write_text(textwrap.dedent(text))
    sys.path.insert(0, str(folder))
    sys.modules["torch_npu"] = types.SimpleNamespace()
    own = dist.all_reduce
    import_mindspeed()
    assert dist.all_reduce is not own and dist.distributed_c10d.all_reduce is not own, (
        "Megatron gets the adaptor's"
    )


def moves_body(rank, size, store, folder, text):
    """Everything that the control plane does, on 4 ranks: 2 train (TP2), 1 rollout, 1 ref."""
    adapt(folder / str(rank), text)
    launch = Launch("single", rank, size, 0, (0,) * size, "", 0)
    placement = place(
        {"train": RoleSize(2, 2), "rollout": RoleSize(1), "ref": RoleSize(1)}, colocate=False
    )
    world = World(launch, placement, DEVICE, timedelta(seconds=LONG), store)
    move, told = RoleTransfer(world), {}
    third = torch.tensor([rank + 1 / 3], dtype=torch.float64)
    told["sum"] = all_sum(third.clone(), world.control).item()
    told["max"] = all_max(third.clone(), world.control).item()
    if world.train.member:
        told["role"] = all_sum(third.clone(), world.train.role_control).item()
        told["first"] = gather_objects(rank, world.train.role_control)
    mine = world.rollout.share(3)
    batch = Batch(1, 0, [Prompt(p, "", np.arange(p), "") for p in range(3)], 1, 3)
    samples = [Sample(np.arange(p), np.zeros(p), False, 0, reward=1.0) for p in range(3)]
    groups = [Group(p, batch.prompts[p], [samples[p]]) for p in mine]
    groups = move.send_to_replicas(batch, groups, range(3), world.rollout, world.ref)
    Giver(move, batch, world.ref, world.train).give(groups)
    told["samples"] = [
        sample.tokens.tolist()
        for delivery in Taker(move, batch, world.ref, world.train, world.rollout).take()
        for _, sample in sorted(delivery.samples.items())
    ]
    told["plan"] = move.from_controller(lambda: world.rank + 7)
    told["all"] = move.all_gather(rank)
    told["controller"] = move.to_controller(rank)
    move.flush(1)
    if rank == 2:
        send_in_turn(world.control)
    if rank == 0:
        told["streams"] = receive_by_stream(world.control)
    world.barrier()
    return told


def send_in_turn(group):
    """Bytes of two streams and an object to rank 0."""
    pending = isend_bytes(torch.full((3,), 1, dtype=torch.uint8), 0, group, tag=2)
    pending += isend_bytes(torch.full((2,), 2, dtype=torch.uint8), 0, group, tag=1)
    pending += isend_object("a plan", 0, group)
    pending += isend_bytes(torch.full((1,), 3, dtype=torch.uint8), 0, group, tag=2)
    for work, _ in pending:
        work.wait()


def receive_by_stream(group):
    """What rank 2 sent, taken in another order."""
    return [
        recv_object(2, group),
        recv_bytes(2, group, tag=1).tolist(),
        recv_bytes(2, group, tag=2).tolist(),
        recv_bytes(2, group, tag=2).tolist(),
    ]


@pytest.mark.parametrize("text", [LOSES_FLOAT64, FOR_DEVICES_ONLY])
def test_the_control_plane_uses_torchs_own_functions(tmp_path, text):
    for rank in range(4):
        (tmp_path / str(rank)).mkdir()
    found = run_ranks(moves_body, 4, tmp_path, text)
    total = sum(rank + 1 / 3 for rank in range(4))
    for rank, told in enumerate(found):
        trains = rank < 2
        assert told["sum"] == pytest.approx(total, rel=1e-15) and told["max"] == 3 + 1 / 3
        assert told.get("role") == (pytest.approx(5 / 3, rel=1e-15) if trains else None)
        assert told.get("first") == ([0, 1] if rank == 0 else None)
        assert told["samples"] == ([[], [0], [0, 1]] if trains else [])
        assert told["plan"] == 7 and told["all"] == [0, 1, 2, 3]
        assert told["controller"] == ([0, 1, 2, 3] if rank == 0 else [])
    assert found[0]["streams"] == ["a plan", [2, 2], [1, 1, 1], [3]]


def adapted_update_body(rank, size, store, folder, *args):
    adapt(folder / str(rank), LOSES_FLOAT64)
    lost = torch.ones(1, dtype=torch.float64)
    result = update_body(rank, size, store, str(folder), *args)
    dist.all_reduce(lost)  # what the adaptor means to do, and does not
    assert lost.item() == 1
    return result


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2)])  # DP2, TP2, PP2
def test_updates_of_several_train_ranks_are_right_beside_it(tmp_path, layout):
    model = make_model("qwen2", tmp_path)
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    (losses, weights), _ = run_ranks(adapted_update_body, 2, tmp_path, layout, [])
    compare(model, losses, weights)


def test_nothing_but_the_tensor_plane_calls_what_may_have_been_replaced():
    files = {
        path.relative_to(ROOT / "r1zero").as_posix(): path.read_text(encoding="utf-8")
        for path in (ROOT / "r1zero").rglob("*.py")
    }
    assert {name for name, text in files.items() if CALL.search(text)} == TENSOR_PLANE
