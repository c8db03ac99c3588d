"""Launch variables, placement, moves, and what happens when a rank fails."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.multiproc import DEVICE, run_ranks
from support.patience import LONG, wait_until

from r1zero import main, trainer
from r1zero.distributed.groups import World
from r1zero.distributed.launch import Launch, read_launch
from r1zero.distributed.placement import RoleSize, place
from r1zero.distributed.spawn import free_port
from r1zero.distributed.transfer import RoleTransfer
from r1zero.errors import BadInput
from r1zero.policy.handover import Giver, Taker
from r1zero.runtime import Runtime
from r1zero.step import StepOutcome, train_step
from r1zero.types import Batch, Group, Prompt, Sample

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = dict(
    RANK="3",
    WORLD_SIZE="4",
    LOCAL_RANK="1",
    LOCAL_WORLD_SIZE="2",
    MASTER_ADDR="host",
    MASTER_PORT="1234",
)
SLURM = dict(
    SLURM_PROCID="4",
    SLURM_STEP_NUM_TASKS="5",
    SLURM_LOCALID="0",
    SLURM_STEP_TASKS_PER_NODE="2(x2),1",
    SLURM_JOB_ID="77",
    SLURM_STEP_ID="3",
    MASTER_ADDR="first",
)


@pytest.fixture
def environment(monkeypatch):
    for name in [n for n in os.environ if n.startswith("SLURM_") or n in TORCHRUN]:
        monkeypatch.delenv(name)
    return lambda values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def test_torchrun_variables_are_read_and_win_over_slurms(environment):
    environment(SLURM | TORCHRUN)
    assert read_launch() == Launch("torchrun", 3, 4, 1, (0, 0, 1, 1), "host", 1234)


def test_slurm_variables_are_read(environment):
    environment(SLURM)
    found = read_launch()
    assert (found.launcher, found.rank, found.world_size, found.node_of_rank) == (
        "slurm",
        4,
        5,
        (0, 0, 1, 1, 2),
    )
    assert found.address == "first" and 20000 <= found.port < 40000
    environment({"SLURM_STEP_ID": "4"})
    assert read_launch().port != found.port, "two steps of a job must not meet on one port"


def test_nothing_set_means_a_world_of_one_even_in_a_batch_script(environment):
    environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})  # a batch script runs before srun
    assert read_launch().launcher == "single"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x must be a whole number"),
        ({"LOCAL_WORLD_SIZE": "3"}, "WORLD_SIZE=4 is not a multiple of LOCAL_WORLD_SIZE=3"),
        (SLURM | {"SLURM_DISTRIBUTION": "cyclic"}, "--distribution=cyclic"),
    ],
)
def test_a_broken_environment_is_refused(environment, change, sentence):
    environment(change if "SLURM_PROCID" in change else TORCHRUN | change)
    with pytest.raises(BadInput, match=re.escape(sentence)):
        read_launch()


def test_ranks_of_the_7b_placement():
    placed = place(
        {"train": RoleSize(8, 2, 4), "rollout": RoleSize(6, 2), "ref": RoleSize(2, 2)},
        colocate=False,
    )
    assert placed.world_size == 16
    assert placed.train.rank_groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert (
        placed.train.rank_groups("pp") == [[0, 2, 4, 6], [1, 3, 5, 7]]
        and placed.train.output_rank(0) == 6
    )
    assert placed.rollout.rank_groups("tp") == [[8, 9], [10, 11], [12, 13]]
    assert placed.rollout.rank_groups("dp") == [[8, 10, 12], [9, 11, 13]]
    assert placed.nodes_crossed([rank // 8 for rank in range(16)]) == []
    assert "rollout ranks [8, 9]" in placed.nodes_crossed([rank // 9 for rank in range(16)])[0]
    for span in placed.grids:
        for rank in span.ranks:
            assert span.rank_at(**span.index_of(rank)) == rank


def move_body(rank, size, store):
    """7 ranks: 2 train (TP2), 3 rollout, 2 ref: groups cross twice, each role marking them."""
    placement = place(
        {"train": RoleSize(2, 2), "rollout": RoleSize(3), "ref": RoleSize(2)}, colocate=False
    )
    world = World(
        Launch("single", rank, size, 0, (0,) * size, "", 0),
        placement,
        DEVICE,
        timedelta(seconds=LONG),
        store,
    )
    move, positions = RoleTransfer(world), range(2, 9)
    prompts = [Prompt(p, f"q{p}", np.arange(p, dtype=np.int32), "") for p in range(9)]
    batch = Batch(1, 0, prompts, 1, 9, accumulates=True)

    def roll():
        """Of what lies at these positions, 4 has not come this far."""
        mine = [p for p in positions if p in world.rollout.share(9) and p != 4]
        return [
            Group(p, prompts[p], [Sample(np.full(3, p), np.zeros(3), False, 0, reward=p)])
            for p in mine
        ]

    def look(groups):
        for group in groups:
            group.samples[0].ref_logprobs = np.full(3, world.rank)
        return groups

    groups = roll()  # nothing outside the role
    groups = move.send_to_replicas(batch, groups, positions, world.rollout, world.ref)
    if world.ref.member:
        groups = look(groups)
    Giver(move, batch, world.ref, world.train).give(groups)
    deliveries = Taker(move, batch, world.ref, world.train, world.rollout).take()
    nothing = move.send_to_replicas(batch, [], range(0), world.rollout, world.ref)
    told = move.from_controller(lambda: {"from": world.rank})
    move.flush(1)
    check_groups_of_members(world)
    return (
        world.role_names,
        [
            (number, sample.reward, sample.tokens.tolist(), sample.ref_logprobs[0])
            for delivery in deliveries
            for number, sample in sorted(delivery.samples.items())
        ],
        nothing,
        told,
        (move.traffic.sent, move.traffic.received),
    )


def test_a_few_ranks_of_a_large_world_are_the_first_of_each_role():
    sizes = {"train": RoleSize(512), "rollout": RoleSize(448), "ref": RoleSize(64)}
    placed = place(sizes, colocate=False)
    expected = [*range(31), *range(512, 512 + 27), *range(960, 960 + 4)]
    assert placed.first_ranks(64) == expected
    tiny_role = place(sizes | {"ref": RoleSize(1)}, colocate=False)
    assert tiny_role.first_ranks(64)[-1] == 960, "each role has one at least"
    every = place({"train": RoleSize(65), "rollout": RoleSize(65)}, colocate=True)
    assert every.first_ranks(64) == list(range(63)) and every.first_ranks(65) == list(range(65))


def test_ranks_of_a_large_world_have_a_log_when_they_have_something_to_say(tmp_path):
    """Of three ranks, one of 256 and two of 257; what libraries say is an error or nothing."""
    script = LOGGING.format(root=str(ROOT), folder=tmp_path / "logs")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=LONG)
    said = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    lines = {
        name: [line.split(" ", 2)[2] for line in text.splitlines()] for name, text in said.items()
    }
    everything = ["INFO one", "WARNING two", "WARNING three", "ERROR four"]
    assert lines == {
        "rank_0000.log": everything,
        "rank_0001.log": everything,
        "rank_0003.log": ["WARNING two", "ERROR four"],
    }, "the silent rank 2 has none"


LOGGING = """
import logging, sys
from pathlib import Path
sys.path[0] = "{root}"
from r1zero.distributed.log import start_logging
for rank, size, speaks in ((0, 257, 1), (1, 256, 1), (2, 257, 0), (3, 257, 1)):
    log = start_logging(Path("{folder}"), rank, size, to_console=rank == 0)
    log.info("one")
    if speaks:
        log.warning("two")
    logging.getLogger("library").warning("three")
    if speaks:
        logging.getLogger("library").error("four")
"""


def check_groups_of_members(world):
    """Groups that only their members ask for, between those that a library makes on all ranks; by
    now the ranks are in different numbers of groups."""
    for members in ([1, 2, 6], [1, 2], [0, 6], [1, 2, 6]):
        group = world.tensor_group(members, 64)
        assert (group is not None) == (world.rank in members)
        every = dist.new_group([0, 2, 5])
        if group is not None:
            total = torch.tensor([float(world.rank)])
            dist.all_reduce(total, group=group)
            assert total.item() == sum(members)
        if world.rank in (0, 2, 5):
            total = torch.ones(1)
            dist.all_reduce(total, group=every)
            assert total.item() == 3
    assert world.tensor_group([1, 2, 6], 64) is world.tensor_group([1, 2, 6], 64)


def test_groups_move_between_roles():
    results = run_ranks(move_body, 7)
    expected = [(p, float(p), [p] * 3, 5 + p % 2) for p in (2, 3, 5, 6, 7, 8)]
    # A message has two counts of 8 bytes; a group of one sample of 3 tokens takes a row of 40 bytes,
    # one of 48, and 3 * 8. Every rollout rank tells both ref ranks, rank 3 of position 7 alone.
    # A sample on its way to train takes a row of 48 bytes and 3 * 12, a message one count.
    traffic = [(0, 2 * 8 + 6 * 84)] * 2
    traffic += [(2 * 16 + groups * 112, 0) for groups in (2, 1, 3)]
    traffic += [(8 + 3 * 84, 3 * 16 + 3 * 112)] * 2
    for rank, (roles, groups, nothing, told, bytes_moved) in enumerate(results):
        assert roles == ("train" if rank < 2 else "rollout" if rank < 5 else "ref")
        assert groups == (expected if rank < 2 else [])
        assert nothing == [] and told == {"from": 0}
        assert bytes_moved == traffic[rank]


# -- failures: joined without torchrun, so that nobody else cleans up -----------------------------


def rank_of_a_job(rank: int, bad: int, folder: Path, port: int) -> None:
    """The program as Slurm starts it on a rank of four; what it says goes to `<rank>.err`. Rank
    `bad` fails in step 3."""
    os.environ |= SLURM | dict(
        SLURM_PROCID=str(rank),
        SLURM_STEP_NUM_TASKS="4",
        SLURM_LOCALID=str(rank),
        SLURM_STEP_TASKS_PER_NODE="4",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    os.dup2(os.open(folder / f"{rank}.err", os.O_CREAT | os.O_WRONLY), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    if rank == bad:
        trainer.train_step = fails_in_step_3
    job = ["training.train_iters=100000", "training.eval_data_path=null"]
    sys.argv = ["main.py", "--config", "tiny", *job, f"output_dir={folder / 'run'}"]
    os._exit(main.main())


def fails_in_step_3(number: int, runtime: Runtime) -> StepOutcome | None:
    if number == 3:
        raise ValueError("the moon is in the way")
    return train_step(number, runtime)


def run_job(folder: Path, bad: int = -1, killed: int | None = None) -> tuple[list[int], str]:
    """Run the tiny job; kill a rank after the first step, if one is named. Exit codes, and all of
    standard error.

    A rank that nobody ends would wait for training.distributed_timeout_minutes, longer than this
    does.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    ranks = [
        context.Process(target=rank_of_a_job, args=(rank, bad, folder, port)) for rank in range(4)
    ]
    for process in ranks:
        process.start()
    try:
        if killed is not None:
            wait_until((folder / "run" / "metrics.jsonl").exists)
            os.kill(ranks[killed].pid, signal.SIGKILL)
        wait_until(lambda: all(process.exitcode is not None for process in ranks))
    finally:
        for process in ranks:
            process.kill()
            process.join()
    errors = "".join((folder / f"{rank}.err").read_text() for rank in range(4))
    return [process.exitcode for process in ranks], errors


@pytest.mark.parametrize("bad", [0, 3])
def test_a_failing_rank_ends_the_job_with_one_cause(tiny, tmp_path, bad):
    codes, errors = run_job(tmp_path, bad=bad)
    assert codes == [1, 1, 1, 1]
    said = [line for line in errors.splitlines() if line.startswith("r1zero:")]
    role = {0: "train", 3: "ref"}[bad]
    assert said == [f"r1zero: rank {bad} ({role}) failed: ValueError: the moon is in the way"]
    assert "Traceback" not in errors
    assert (
        "the moon is in the way" in (tmp_path / "run" / "logs" / f"rank_{bad:04d}.log").read_text()
    )


@pytest.mark.parametrize("killed", [0, 2])
def test_a_killed_rank_ends_the_job(tiny, tmp_path, killed):
    codes, errors = run_job(tmp_path, killed=killed)
    assert codes == [-signal.SIGKILL if rank == killed else 1 for rank in range(4)]
    assert len([line for line in errors.splitlines() if line.startswith("r1zero:")]) == 1, errors
    assert (
        "rank 0 or its node" if killed == 0 else f"rank {killed} (rollout)"
    ) + " ended without a word" in errors
    assert "Traceback" not in errors
