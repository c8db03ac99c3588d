"""Measure saving and loading of a model with its optimizer, beside what the disk can do.

    python tools/bench_checkpoint.py --model models/SmolLM2-135M-Instruct --folder /tmp/bench_checkpoint

One process. Prints one JSON line: sizes, seconds, and bytes a second of the raw disk (one file,
written and synced, then read back with the page cache dropped for it), of a save, of a load, and
what an asynchronous save costs: the time that training waits, and the longer updates while files
are written.
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

from r1zero.config.schema import placement
from r1zero.distributed.launch import Launch
from r1zero.distributed.log import hush_libraries
from r1zero.preflight.resolve import load_config

if TYPE_CHECKING:  # these are imported once the device is set
    from r1zero.checkpoint.train_state import Writing
    from r1zero.policy.actor import Actor
    from r1zero.types import Batch, Group

BLOCK = 64 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench_checkpoint"))
    parser.add_argument("--bf16", default="true")
    parser.add_argument(
        "--updates", type=int, default=3, help="updates timed without and with a save beside them"
    )
    args = parser.parse_args()
    hush_libraries()
    policy, update = build(args.model, args.bf16)
    update()  # makes the optimizer's state
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    print(
        json.dumps(
            {"model": Path(args.model).name, "bf16": args.bf16 == "true"}
            | measure(policy, update, args.folder, args.updates)
        )
    )
    shutil.rmtree(args.folder)
    return 0


def build(model: str, bf16: str) -> tuple[Actor, Callable[[], None]]:
    """A policy in a world of one, and a function that updates it once on random samples."""
    from r1zero.distributed import device as devices

    device = devices.prepare(devices.detect(), 0)
    from r1zero.algo.dealing import Dealer, SampleTable
    from r1zero.distributed.groups import World
    from r1zero.models.config import ModelConfig
    from r1zero.models.dtype import Dtype
    from r1zero.policy.actor import Actor
    from r1zero.policy.actor_config import actor_config
    from r1zero.policy.handover import Delivery
    from r1zero.policy.megatron import RoleModel

    cfg, _ = load_config(
        "smollm2_135m_gsm8k", [f"actor_rollout.load={model}", f"training.bf16={bf16}"]
    )
    world = World(
        Launch("single", 0, 1, 0, (0,), "", 0), placement(cfg, 1), device, timedelta(minutes=10)
    )
    dtype = Dtype.of(bool(cfg.training.bf16)).torch
    role = RoleModel(
        ModelConfig.from_folder(model),
        world.train,
        device,
        dtype,
        cfg.training.seq_length,
        False,
        False,
        1,
    )
    role.load(model)
    policy = Actor(role, actor_config(cfg.actor_rollout, cfg.algorithm, 1000))
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

    return policy, update


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
    policy: Actor, update: Callable[[], None], folder: Path, updates: int
) -> dict[str, float]:
    """Time everything; the raw disk twice, around the saves."""
    from r1zero.checkpoint.train_state import Writing, load_policy

    def save(name: str, beside: bool) -> tuple[Writing, float]:
        (folder / name).mkdir()
        began = time.monotonic()
        writing = Writing(policy, folder / name, 1)
        writing.start() if beside else writing.run()
        return writing, time.monotonic() - began

    writing, seconds = save("sync", beside=False)
    assert writing.error is None, writing.error
    writing.finalize()
    size = sum(path.stat().st_size for path in (folder / "sync").iterdir())
    disk = [raw_disk(folder / "raw", size)]
    drop_cache(folder / "sync")
    load = timed(lambda: load_policy(policy, folder / "sync", 1))
    disk.append(raw_disk(folder / "raw", size))
    shutil.rmtree(folder / "sync")
    alone = min(timed(update) for _ in range(updates))
    began = time.monotonic()
    writing, waited = save("async", beside=True)
    beside = []
    while not writing.done:
        beside.append(timed(update))
    writing.join()
    written = time.monotonic() - began
    write, read = (sum(rates) / len(rates) for rates in zip(*disk, strict=True))
    return {
        "gigabytes": size / 1e9,
        "disk/write_gigabytes_per_second": write,
        "disk/read_gigabytes_per_second": read,
        "save/seconds": seconds,
        "save/share_of_disk": size / 1e9 / seconds / write,
        "load/seconds": load,
        "load/share_of_disk": size / 1e9 / load / read,
        "async/waited_seconds": waited,
        "async/written_seconds": written,
        "update/seconds": alone,
        "update/seconds_while_writing": sum(beside) / len(beside) if beside else alone,
        "update/while_writing": len(beside),
    }


def raw_disk(path: Path, size: int) -> tuple[float, float]:
    """Write and sync a file of so many bytes, and read it from the disk; GB/s of both."""
    block = os.urandom(BLOCK)
    began = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for _ in range(0, size, BLOCK):
            file.write(block)
        os.fsync(file.fileno())
    write = time.monotonic() - began
    drop_cache(path.parent)
    began = time.monotonic()
    with path.open("rb", buffering=0) as file:
        while file.read(BLOCK):
            pass
    read = time.monotonic() - began
    written = path.stat().st_size
    path.unlink()
    return written / 1e9 / write, written / 1e9 / read


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
    sys.exit(main())
