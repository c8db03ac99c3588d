"""Measure saving and loading of a model with its optimizer, and its export, beside what the disk can do.

    python tools/bench_checkpoint.py --model models/SmolLM2-135M-Instruct --folder /tmp/bench_checkpoint
    torchrun --nproc-per-node 4 tools/bench_checkpoint.py --model ... --folder ...

One process or several, all of them train ranks. Prints one JSON line: sizes, seconds (of the slowest
rank), and bytes a second of the raw disk (one file, written and synced, then read back with the page
cache dropped for it), of a save, of a load, and what an asynchronous save costs: the time that
training waits, and the longer updates while files are written. `host_gigabytes` is the host memory
that the rank with most of it took beside what training holds. The export is measured with one writer
and with all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])

from r1zero.checkpoint.progress import layout_of
from r1zero.config.schema import placement
from r1zero.distributed.launch import hush_torch, read_launch
from r1zero.distributed.log import hush_libraries
from r1zero.distributed.process import end
from r1zero.preflight.resolve import load_config

if TYPE_CHECKING:  # these are imported once the device is set
    from r1zero.checkpoint.train_state import Writing
    from r1zero.distributed.groups import World
    from r1zero.policy.actor import Actor
    from r1zero.types import Batch, Group

BLOCK = 64 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench_checkpoint"))
    parser.add_argument("--bf16", default="true")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument(
        "--updates", type=int, default=3, help="updates timed without and with a save beside them"
    )
    parser.add_argument(
        "--shard-megabytes", type=int, default=64, help="of a file of the exported model"
    )
    args = parser.parse_args()
    hush_torch()
    hush_libraries()
    world, policy, update = build(args)
    update()  # makes the optimizer's state
    if world.is_controller:
        shutil.rmtree(args.folder, ignore_errors=True)
        args.folder.mkdir(parents=True)
    world.barrier()
    numbers = {
        "model": Path(args.model).name,
        "bf16": args.bf16 == "true",
        "layout": layout_of(world.train.span),
    }
    numbers |= measure(world, policy, update, args.folder, args.updates)
    numbers |= measure_export(world, policy, args)
    if world.is_controller:
        print(json.dumps(numbers))
        shutil.rmtree(args.folder)
    world.leave()
    return 0


def build(args: argparse.Namespace) -> tuple[World, Actor, Callable[[], None]]:
    """A world of train ranks, its policy, and a function that updates it once on random samples."""
    from r1zero.distributed import device as devices

    launch = read_launch()
    device = devices.prepare(devices.detect(), launch.local_rank)
    from r1zero.algo.dealing import Dealer, SampleTable
    from r1zero.distributed.groups import World
    from r1zero.models.config import ModelConfig
    from r1zero.models.dtype import Dtype
    from r1zero.policy.actor import Actor
    from r1zero.policy.actor_config import actor_config
    from r1zero.policy.handover import Delivery
    from r1zero.policy.megatron import RoleModel

    cfg, _ = load_config(
        "smollm2_135m_gsm8k",
        [
            f"actor_rollout.load={args.model}",
            f"training.bf16={args.bf16}",
            "resource_pool.colocate=true",
            f"resource_pool.actor_rollout=[{launch.world_size}]",
            "resource_pool.ref=[]",
            f"actor_rollout.tensor_model_parallel_size={args.tp}",
            f"actor_rollout.pipeline_model_parallel_size={args.pp}",
        ],
    )
    roles = placement(cfg, launch.world_size)
    world = World(launch, roles, device, timedelta(minutes=10))
    dtype = Dtype.of(bool(cfg.training.bf16)).torch
    role = RoleModel(
        ModelConfig.from_folder(args.model),
        world.train,
        device,
        dtype,
        cfg.training.seq_length,
        False,
        False,
        1,
    )
    role.load(args.model)
    policy = Actor(role, actor_config(cfg, 1000))
    batch, groups = samples(role.shape.vocab_size)
    dealer = Dealer(batch, world.train.span.dp)
    [deal] = dealer.add(SampleTable.of(groups, batch.samples_per_prompt))
    mine = {}
    for number in deal.shares[world.train.replica]:
        group = groups[number // batch.samples_per_prompt]
        mine[number] = group.samples[number % batch.samples_per_prompt]

    def update() -> None:
        policy.begin(batch)
        policy.learn(Delivery(deal, mine))

    return world, policy, update


def samples(vocab: int) -> tuple[Batch, list[Group]]:
    """A batch of two prompts with four random responses each."""
    import numpy as np

    from r1zero.types import Batch, Group, Prompt, Sample

    chance = np.random.default_rng(1)
    groups = []
    for position in range(2):
        prompt = Prompt(position, "", chance.integers(3, vocab, 32, dtype=np.int32), "")
        members = [
            Sample(
                chance.integers(3, vocab, 64, dtype=np.int32), np.full(64, -3, np.float32), False, 0
            )
            for _ in range(4)
        ]
        for sample in members:
            sample.ref_logprobs = sample.logprobs
            sample.reward = float(chance.random())
        groups.append(Group(position, prompt, members))
    return Batch(1, 0, [group.prompt for group in groups], 4, 8), groups


def measure(
    world: World, policy: Actor, update: Callable[[], None], folder: Path, updates: int
) -> dict[str, float]:
    """Time everything; the raw disk twice, around the saves."""
    from r1zero.checkpoint.train_state import Writing, load_policy

    def save(name: str, beside: bool) -> tuple[Writing, float, float]:
        """The save, and the seconds and host memory that it took until training may go on."""
        if world.is_controller:
            (folder / name).mkdir()
        world.barrier()
        peak = HostPeak()
        began = time.monotonic()
        writing = Writing(policy, folder / name, 1)
        writing.start() if beside else writing.run()
        return writing, worst(world, time.monotonic() - began), worst(world, peak.gigabytes)

    writing, seconds, host = save("sync", beside=False)
    assert writing.error is None, writing.error
    writing.finalize()
    world.barrier()
    size = sum(path.stat().st_size for path in (folder / "sync").iterdir())
    disk = [raw_disk(world, folder / "raw", size)]
    drop_cache(folder / "sync")
    world.barrier()
    peak = HostPeak()
    load = worst(world, timed(lambda: load_policy(policy, folder / "sync", 1)))
    host_of_load = worst(world, peak.gigabytes)
    disk.append(raw_disk(world, folder / "raw", size))
    alone = worst(world, min(timed(update) for _ in range(updates)))
    began = time.monotonic()
    writing, waited, host_beside = save("async", beside=True)
    beside = []
    while worst(world, not writing.done):
        beside.append(worst(world, timed(update)))
    writing.join()
    written = worst(world, time.monotonic() - began)
    world.barrier()
    write, read = (sum(rates) / len(rates) for rates in zip(*disk, strict=True))
    return {
        "gigabytes": size / 1e9,
        "disk/write_gigabytes_per_second": write,
        "disk/read_gigabytes_per_second": read,
        "save/seconds": seconds,
        "save/share_of_disk": size / 1e9 / seconds / write,
        "save/host_gigabytes": host,
        "load/seconds": load,
        "load/share_of_disk": size / 1e9 / load / read,
        "load/host_gigabytes": host_of_load,
        "async/waited_seconds": waited,
        "async/written_seconds": written,
        "async/host_gigabytes": host_beside,
        "update/seconds": alone,
        "update/seconds_while_writing": sum(beside) / len(beside) if beside else alone,
        "update/while_writing": len(beside),
    }


def measure_export(world: World, policy: Actor, args: argparse.Namespace) -> dict[str, float]:
    """Time the export, with one writer and with all, in turns."""
    from r1zero.checkpoint.export import ModelFolder, write_model
    from r1zero.distributed.transfer import RoleTransfer

    target = ModelFolder(
        args.folder / "model",
        Path(args.model),
        "bfloat16" if args.bf16 == "true" else "float32",
        shard_bytes=args.shard_megabytes * 10**6,
    )
    move = RoleTransfer(world)
    shape = policy.model.shape
    seconds: dict[bool, list[float]] = {True: [], False: []}
    host: dict[bool, float] = {}
    for alone in (True, False, True, False):
        world.barrier()
        peak = HostPeak()
        began = time.monotonic()
        problem = write_model(move, shape, policy.parameters(), target, alone)
        assert problem is None, problem
        seconds[alone].append(worst(world, time.monotonic() - began))
        host[alone] = worst(world, peak.gigabytes)
    files = list(target.folder.glob("*.safetensors"))
    return {
        "export/gigabytes": sum(path.stat().st_size for path in files) / 1e9,
        "export/files": len(files),
        "export/seconds": min(seconds[False]),
        "export/host_gigabytes": host[False],
        "export/seconds_of_one_writer": min(seconds[True]),
        "export/host_gigabytes_of_one_writer": host[True],
    }


class HostPeak:
    """The most host memory that this process holds from now on, beside what it holds now (Linux)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
        self._before = self._status("VmRSS")

    @property
    def gigabytes(self) -> float:
        return (self._status("VmHWM") - self._before) / 1e6

    def _status(self, key: str) -> int:
        """In units of 1000 bytes."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024 // 1000
        raise KeyError(key)


def worst(world: World, value: float) -> float:
    """The largest over all ranks."""
    import torch

    from r1zero.distributed.collectives import all_max

    return float(all_max(torch.tensor([value], dtype=torch.float64), world.control))


def raw_disk(world: World, path: Path, size: int) -> tuple[float, float]:
    """Write and sync a file of so many bytes, and read it from the disk; GB/s of both. One rank
    does it, the others wait."""
    write = read = 0.0
    if world.is_controller:
        write = size / 1e9 / timed(lambda: write_raw(path, size))
        drop_cache(path.parent)
        read = size / 1e9 / timed(lambda: read_raw(path))
        path.unlink()
    return worst(world, write), worst(world, read)


def write_raw(path: Path, size: int) -> None:
    block = os.urandom(BLOCK)
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, BLOCK):
            file.write(block[: size - start])
        os.fsync(file.fileno())


def read_raw(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(BLOCK):
            pass


def drop_cache(folder: Path) -> None:
    """Let the kernel forget the files' pages, so that reading them asks the disk."""
    for path in folder.iterdir():
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def timed(function: Callable[[], object]) -> float:
    began = time.monotonic()
    function()
    return time.monotonic() - began


if __name__ == "__main__":
    end(main())
