"""The optimizer's state on disk: each rank's own boxes, and together what Megatron itself would
write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from support.models import make_model
from support.multiproc import DEVICE, run_ranks
from support.updates import deliveries, make_groups
from support.worlds import make_world

from r1zero.checkpoint.optimizer_state import SHARDING, boxes, sharded_optimizer_state
from r1zero.checkpoint.train_state import Writing, load_policy
from r1zero.models.config import ModelConfig
from r1zero.policy.actor import Actor
from r1zero.policy.actor_config import actor_config
from r1zero.policy.megatron import RoleModel
from r1zero.preflight.resolve import load_config
from r1zero.types import Batch


@pytest.mark.parametrize("shape", [(7,), (4, 5), (1, 6), (6, 1), (3, 4, 2), (2, 1, 4)])
def test_boxes_of_a_run_are_its_elements_in_their_order(shape):
    numbers = np.arange(np.prod(shape)).reshape(shape)
    for start in range(numbers.size + 1):
        for stop in range(start, numbers.size + 1):
            found = []
            for offset, size in boxes(shape, start, stop):
                place = tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
                assert numbers[place].shape == size
                found.append(numbers[place].ravel())
            assert len(found) <= 2 * len(shape) - 1
            assert np.concatenate([*found, []]).tolist() == list(range(start, stop))


def make_policy(world, folder: Path, dtype: torch.dtype, *overrides: str) -> Actor:
    """The policy of a rank, as a run makes it."""
    model = RoleModel(
        ModelConfig.from_folder(folder), world.train, DEVICE, dtype, 128, False, False, 1
    )
    model.load(folder)
    cfg, _ = load_config("tiny", ["actor_rollout.n_samples_per_prompt=4", *overrides])
    return Actor(model, actor_config(cfg, 4))


def update(policy: Actor) -> None:
    groups = make_groups()[:2]
    batch = Batch(1, 0, [group.prompt for group in groups], 4, 8)
    policy.begin(batch)
    for delivery in deliveries(batch, groups, policy.grid):
        policy.learn(delivery)


def by_megatron(policy: Actor, loading: bool = False) -> dict:
    """The state as megatron-core describes it, which gathers. This is how checkpoints of version
    0.2 were written."""
    for buffer in policy.ddp.buffers:  # else what lies behind the first bucket would be shifted
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
    metadata = SHARDING | {"dp_cp_group": policy.model.groups.dp}
    model = model_by_megatron(policy)
    optimizer = policy.optimizer.sharded_state_dict(model, loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}


def model_by_megatron(policy: Actor) -> dict:
    metadata = SHARDING | {"dp_cp_group": policy.model.groups.dp}
    model = policy.model.module.sharded_state_dict(metadata=metadata)
    return {name: part for name, part in model.items() if not name.endswith("_extra_state")}


def save_by_megatron(policy: Actor, folder: Path) -> None:
    """Gather and write; the first rank writes what all replicas hold."""
    if policy.grid.span.rank_at() == torch.distributed.get_rank():
        folder.mkdir()
    torch.distributed.barrier()
    with policy.model.active(), policy.grid.as_default_group(), torch.no_grad():
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        dist_checkpointing.save(by_megatron(policy), str(folder), strategy)


def load_by_megatron(policy: Actor, folder: Path) -> None:
    with policy.model.active(), policy.grid.as_default_group(), torch.no_grad():
        loaded = dist_checkpointing.load(by_megatron(policy, loading=True), str(folder))
        policy.model.module.load_state_dict(loaded["model"], strict=False)
        policy.optimizer.load_state_dict(loaded["optimizer"])


def save(policy: Actor, folder: Path) -> None:
    if torch.distributed.get_rank() == 0:
        folder.mkdir()
    torch.distributed.barrier()
    writing = Writing(policy, folder, 1)
    writing.run()
    assert writing.error is None
    writing.finalize()


def saving(rank, size, store, folder, layout, dtype):
    """Update once, and save in both ways."""
    folder = Path(folder)
    policy = make_policy(make_world(rank, size, store, layout), folder / "model", dtype)
    update(policy)
    save(policy, folder / "ours")
    save_by_megatron(policy, folder / "theirs")
    return held(policy)


def held(policy: Actor) -> tuple[int, int]:
    """Elements of state that this rank holds, and that it would write: its own tensors, no
    copies."""
    [optimizer] = policy.optimizer.chained_optimizers
    own = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
    for state in optimizer.optimizer.state.values():
        own += [value for value in state.values() if torch.is_tensor(value)]
    with policy.model.active(), policy.grid.as_default_group():
        model = model_by_megatron(policy)
    written = sharded_optimizer_state(optimizer, model).values()
    places = {tensor.untyped_storage().data_ptr() for tensor in own}
    assert {box.data.untyped_storage().data_ptr() for box in written} <= places
    return sum(tensor.numel() for tensor in own), sum(box.data.numel() for box in written)


def loading(rank, size, store, folder, layout, dtype):
    """On another layout, read each of the two in the other's way, and write what came of it."""
    folder = Path(folder)
    policy = make_policy(make_world(rank, size, store, layout), folder / "model", dtype)
    save(policy, folder / "untouched")  # no update has been: no moments yet
    load_policy(policy, folder / "theirs", updates=1)
    save_by_megatron(policy, folder / "theirs by ours")
    update(policy)  # the next checkpoint lies over another state
    load_by_megatron(policy, folder / "ours")
    save_by_megatron(policy, folder / "ours by theirs")


def whole_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, as torch itself reads it."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.full(entry.size, torch.nan, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
    }
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def assert_same_tensors(found: Path, expected: Path) -> None:
    ours, theirs = whole_tensors(found), whole_tensors(expected)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize(
    ("family", "dtype", "first", "second"),
    [
        ("qwen2", torch.bfloat16, (4, (2, 1)), (2, (1, 2))),
        ("qwen2_tied", torch.float32, (4, (1, 2)), (3, (1, 1))),
    ],
    ids=["TP2 DP2 to PP2, bf16", "PP2 DP2 tied to DP3, fp32"],
)
def test_on_disk_lies_what_megatron_writes_and_each_reads_the_other(
    tmp_path, family, dtype, first, second
):
    make_model(family, tmp_path / "model")
    size, layout = first
    for own, written in run_ranks(saving, size, str(tmp_path), layout, dtype):
        assert own == written
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    theirs = whole_tensors(tmp_path / "theirs")
    moments = [tensor for name, tensor in theirs.items() if ".exp_avg." in name]
    assert moments and all(tensor.abs().max() > 0 for tensor in moments)

    size, layout = second
    run_ranks(loading, size, str(tmp_path), layout, dtype)
    assert_same_tensors(tmp_path / "theirs by ours", tmp_path / "theirs")
    assert_same_tensors(tmp_path / "ours by theirs", tmp_path / "theirs")
    untouched = whole_tensors(tmp_path / "untouched")
    assert untouched.keys() == theirs.keys()
    assert all(not tensor.any() for name, tensor in untouched.items() if ".exp_avg" in name)


def going_on(rank, size, store, folder):
    """Save with one optimizer and go on with the other: one stays, one lies on the host. Returns
    what both updated next."""
    folder = Path(folder)
    world = make_world(rank, size, store, (1, 1))
    away = ["training.optimizer_offload=true"]
    found = []
    for first, second in (([], away), (away, [])):
        one = make_policy(world, folder / "model", torch.bfloat16, *first)
        update(one)
        saved = folder / f"by {first}"
        save(one, saved)
        two = make_policy(world, folder / "model", torch.bfloat16, *second)
        load_policy(two, saved, updates=1)
        update(one)
        update(two)
        found.append([list(policy.model.module.parameters()) for policy in (one, two)])
    return found


def test_an_offloaded_optimizer_goes_on_where_another_was_saved_and_the_other_way_round(tmp_path):
    make_model("qwen2", tmp_path / "model")
    for rank in run_ranks(going_on, 2, str(tmp_path)):
        for one, two in rank:
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert_same_tensors(tmp_path / "by []", tmp_path / "by ['training.optimizer_offload=true']")
