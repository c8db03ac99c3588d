"""Checkpoints of a mixture of experts: saved at EP 2, gone on from with experts cut otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from support.layouts import make_layouts
from support.models import make_model
from support.multiproc import DEVICE, run_ranks
from support.updates import OVERRIDES, deliveries, make_groups
from support.worlds import metrics, run, samples

from r1zero.checkpoint.train_state import Writing, load_policy
from r1zero.distributed.placement import RoleSize
from r1zero.models.config import ModelConfig
from r1zero.policy.actor import Actor
from r1zero.policy.actor_config import actor_config
from r1zero.policy.megatron import RoleModel
from r1zero.preflight.resolve import load_config
from r1zero.types import Batch, joined

# Of four ranks. Where EP is less than the ranks of a stage, several hold the same experts.
SAVED = "CP2_EP2"
UNEVEN = "PP2_EP2_uneven"
LAYOUTS = {
    SAVED: RoleSize(4, cp=2, ep=2),
    "EP1": RoleSize(4),
    "EP4": RoleSize(4, ep=4),
    "TP2_EP2": RoleSize(4, tp=2, ep=2),
    "TP2_EP4": RoleSize(4, tp=2, ep=4),
    UNEVEN: RoleSize(4, pp=2, ep=2, num_layer_list=(1, 3)),
}
ALONE = {"one": RoleSize(1)}
TIMES = ("time/", "throughput/", "memory/", "publish/gigabytes")
OFFLOADED = "training.optimizer_offload=true"


def make_policy(grid, folder: Path, *overrides: str) -> Actor:
    shape = ModelConfig.from_folder(folder / "model")
    model = RoleModel(shape, grid, DEVICE, torch.float32, 128, True, False, seed=1)
    model.load(folder / "model")
    cfg, _ = load_config("tiny", [*OVERRIDES, *overrides])
    return Actor(model, actor_config(cfg, 4))


def update(policy: Actor) -> tuple[float, float]:
    """One update; returns its loss and the norm of its gradient."""
    groups = make_groups()[:2]
    batch = Batch(1, 0, [group.prompt for group in groups], 4, 8)
    policy.begin(batch)
    told = []
    for delivery in deliveries(batch, groups, policy.grid):
        told += policy.learn(delivery)
    [stats] = told
    return joined([stats], "loss"), stats.grad_norm


def going_on(rank, size, store, folder, layouts):
    """Save in the layout that saves, if it is there, and go on in each of them; returns two updates
    of each, by its name."""
    folder = Path(folder)
    world = make_layouts(rank, size, store, layouts)
    found = {}
    if SAVED in layouts:
        policy = make_policy(world.roles[SAVED], folder)
        update(policy)
        save(policy, folder / "saved", world)
        found["without a break"] = [update(policy), update(policy)]
    for name in layouts:
        overrides = [OFFLOADED] if name == SAVED else []
        policy = make_policy(world.roles[name], folder, *overrides)
        load_policy(policy, folder / "saved", updates=1)
        found[name] = [update(policy), update(policy)]
    return found


def save(policy: Actor, folder: Path, world) -> None:
    if world.rank == 0:
        folder.mkdir()
    world.barrier()
    writing = Writing(policy, folder, 1)
    writing.run()
    assert writing.error is None
    world.barrier()
    writing.finalize()
    world.barrier()


@pytest.mark.parametrize(
    ("family", "names"),
    [("qwen3_moe", [*LAYOUTS]), ("qwen3_moe_mixed", [SAVED, UNEVEN])],
    ids=["experts everywhere", "a stage without experts"],
)
def test_a_checkpoint_goes_on_however_experts_are_cut(tmp_path, family, names):
    """With the losses and norms of a run without a break, to five digits; in the layout that saved
    exactly, by an offloaded optimizer."""
    make_model(family, tmp_path / "model")
    found = run_ranks(going_on, 4, str(tmp_path), {name: LAYOUTS[name] for name in names})[0]
    found |= run_ranks(going_on, 1, str(tmp_path), ALONE)[0]
    expected = found.pop("without a break")
    assert found[SAVED] == expected
    assert found.keys() == {*names, *ALONE}
    for name, updates in found.items():
        for one, two in zip(updates, expected, strict=True):
            assert one == pytest.approx(two, rel=1e-5, abs=1e-6), name


def broken_off(rank, size, store, folder, overrides):
    """Two updates after a first one, without a break and from a checkpoint between, in a layout
    whose first rank has no experts; and the counts of updates in a checkpoint after these."""
    folder = Path(folder)
    world = make_layouts(rank, size, store, {UNEVEN: LAYOUTS[UNEVEN]})
    policy = make_policy(world.roles[UNEVEN], folder, *overrides)
    update(policy)
    save(policy, folder / "saved", world)
    expected = [update(policy), update(policy)]
    policy = make_policy(world.roles[UNEVEN], folder, *overrides)
    load_policy(policy, folder / "saved", updates=1)
    found = [update(policy), update(policy)]
    save(policy, folder / "again", world)
    common = load_common_state_dict(str(folder / "again"))
    counts = []
    for state in common["optimizer"].values():
        counts += [group["step"] for group in state["optimizer"]["param_groups"]]
    return expected, found, counts


@pytest.mark.parametrize("overrides", [[], [OFFLOADED]], ids=["stays", "offloaded"])
def test_a_checkpoint_of_a_first_rank_without_experts_goes_on_exactly(tmp_path, overrides):
    """What all ranks have in common is written by the first, which has no state of experts."""
    make_model("qwen3_moe_mixed", tmp_path / "model")
    for expected, found, counts in run_ranks(broken_off, 4, str(tmp_path), overrides):
        assert found == expected
        assert set(counts) == {3}


# All roles on four ranks; experts over the ranks of two replicas.
RUN = [
    "resource_pool.colocate=true",
    "resource_pool.actor_rollout=[4]",
    "resource_pool.ref=[]",
    "actor_rollout.expert_model_parallel_size=4",
    "actor_rollout.tensor_model_parallel_size=2",
    "training.sequence_parallel=true",
    "training.optimizer_offload=true",
    "training.train_iters=2",
    "training.save_interval=1",
    "training.global_batch_size=4",
    "training.eval_data_path=null",
    "actor_rollout.ppo_mini_batch_size=8",
    "actor_rollout.n_samples_per_prompt=4",
    "actor_rollout.entropy_coeff=0.01",  # rewards of a random model are all alike
    "ref.reset_interval=1",  # a reference with experts is saved, too
]


def test_a_run_goes_on_exactly(tiny, tmp_path):
    """Back to its first step, it takes the second one again."""
    folder = tmp_path / "model"
    vocabulary = ModelConfig.from_folder(tiny / "model").vocab_size
    make_model("qwen3_moe", folder, vocab_size=vocabulary, num_hidden_layers=2)
    for file in (tiny / "model").glob("*token*"):
        shutil.copy(file, folder)
    job = [*RUN, f"actor_rollout.load={folder}", f"ref.load={folder}"]
    whole = run(tmp_path / "whole", 4, "tiny", job)
    back = tmp_path / "back"
    shutil.copytree(whole, back)
    (back / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("1\n")
    run(back, 4, "tiny", job)
    assert "TP2 PP1 DP2 EP4" in (back / "logs" / "rank_0000.log").read_text()
    expected, found = metrics(whole)[-1], metrics(back)[-1]
    assert expected["step"] == found["step"] == 2
    assert found["grad_norm"] > 0
    measured = {key for key in expected if not key.startswith(TIMES)}
    assert {key: found[key] for key in measured} == {key: expected[key] for key in measured}
    assert samples(back, 2) == samples(whole, 2)
