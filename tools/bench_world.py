"""Time the start of a world of many local ranks: meeting, groups, first publication, first step.

    python tools/bench_world.py --train 16 --rollout 32 --ref 16          the tiny job, two steps
    python tools/bench_world.py --train 32 --rollout 64 --ref 32 --world  the world and its groups only

The ranks are forked from one process that has all imports, as importing would hide the rest on a
small machine, and meet through a store of rank 0 as under torchrun. Prints one JSON line: seconds
since the first fork until the last rank was there, seconds of making the world (the slowest rank),
CPU seconds, which a busy machine does not change as much, and open files at the end. Exit code 1 if a rank failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from ctypes import Array, c_double
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from r1zero.distributed.device import prepare

prepare("cpu", 0)  # before anything imports Megatron

from r1zero import main as program
from r1zero import trainer
from r1zero.distributed import rendezvous
from r1zero.distributed.groups import World
from r1zero.runtime import Runtime

# What ranks import once they know their roles and model.
for name in (
    "megatron.core.models.gpt.gpt_layer_specs",
    "r1zero.models.megatron_modules",
    "r1zero.rollout.engine",
):
    importlib.import_module(name)

# The job: 32 prompts x 4 = 128 samples, 2 updates of 64.
JOB = [
    "training.train_iters=2",
    "training.eval_data_path=",
    "training.report_interval=0",
    "training.global_batch_size=32",
    "actor_rollout.n_samples_per_prompt=4",
    "actor_rollout.ppo_mini_batch_size=64",
]
# What is noted of every rank: the moment when it was through, or for "making" how long it took.
MARKS = ("met", "world", "making", "prepared", "published", "files")


class Marks:
    """Numbers that ranks write and their parent reads."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._values: Array[c_double] = multiprocessing.RawArray(c_double, ranks * len(MARKS))

    def note(self, rank: int, name: str, value: float) -> None:
        self._values[rank * len(MARKS) + MARKS.index(name)] = value

    def of(self, name: str) -> list[float]:
        return list(self._values[MARKS.index(name) :: len(MARKS)])


def main() -> int:
    args = parse()
    size = args.train + args.rollout + args.ref
    folder = Path(tempfile.mkdtemp(prefix="bench_world_"))
    marks = Marks(size)
    began = time.time()
    ranks = fork(size, lambda rank: run_rank(rank, args, folder, marks))
    found: dict[str, object] = {"ranks": size, "train/rollout/ref": layout(args)}
    if not args.world:
        found["first step"] = seconds_until(folder / "metrics.jsonl", 1, ranks, began)
    for process in ranks:
        process.join()
    failed = [rank for rank, process in enumerate(ranks) if process.exitcode != 0]
    for name in ("met", "world", "prepared", "published"):
        if any(marks.of(name)):
            found[name] = round(max(marks.of(name)) - began, 2)
    found["making the world"] = round(max(marks.of("making")), 2)
    files = [round(count) for count in marks.of("files")]
    found["open files"] = {"rank 0": files[0], "others": max(files[1:], default=0)}
    found["job"] = round(time.time() - began, 2)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found["CPU seconds of all ranks"] = round(used.ru_utime + used.ru_stime, 1)
    if failed:
        found["failed"] = failed
    print(json.dumps(found), flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    if failed:
        return 1
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=8)
    parser.add_argument("--rollout", type=int, default=16)
    parser.add_argument("--ref", type=int, default=8)
    parser.add_argument("--world", action="store_true", help="make the world, and leave")
    parser.add_argument("overrides", nargs="*", help="further keys of the job")
    return parser.parse_args()


def layout(args: argparse.Namespace) -> str:
    return f"{args.train}/{args.rollout}/{args.ref}"


def fork(
    size: int, body: Callable[[int], None], local_size: int | None = None
) -> list[BaseProcess]:
    """Fork the ranks, each with the variables that torchrun would set."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    os.environ |= {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(local_size or size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    ranks: list[BaseProcess] = []
    for rank in range(size):
        process = context.Process(target=body, args=(rank,))
        process.start()
        ranks.append(process)
    return ranks


def run_rank(rank: int, args: argparse.Namespace, folder: Path, marks: Marks) -> None:
    """Be one rank of the job, and note when it gets where."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.argv = ["main.py", "--config", "tiny", f"output_dir={folder}", *JOB, *split(args)]
    sys.argv += args.overrides

    def noted(function: Callable, name: str) -> Callable:
        def wrapped(*arguments: object, **options: object) -> object:
            began = time.time()
            result = function(*arguments, **options)
            now = time.time()
            marks.note(rank, name, now)
            if name == "world":
                marks.note(rank, "making", now - began)
            return result

        return wrapped

    def count_files(world: World) -> None:
        marks.note(rank, "files", len(os.listdir("/proc/self/fd")))
        leave(world)

    leave = World.leave
    prepare_nothing = lambda run, world: None  # noqa: E731
    for owner, attribute, function, name in (
        (rendezvous, "join", rendezvous.join, "met"),
        (World, "__init__", World.__init__, "world"),
        (trainer, "prepare", prepare_nothing if args.world else trainer.prepare, "prepared"),
        (Runtime, "start", Runtime.start, "published"),
    ):
        setattr(owner, attribute, noted(function, name))
    setattr(World, "leave", count_files)  # noqa: B010 - mypy forbids the plain assignment
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os._exit(program.main())


def split(args: argparse.Namespace) -> list[str]:
    """The keys that give each role its ranks."""
    return [
        f"actor_rollout.num_gpus_for_train={args.train}",
        f"actor_rollout.num_gpus_for_infer={args.rollout}",
        f"resource_pool.actor_rollout=[{args.train + args.rollout}]",
        f"resource_pool.ref=[{args.ref}]",
        f"actor_rollout.micro_batch_size={max(1, 32 // args.train)}",
        f"ref.micro_batch_size={max(1, 32 // args.ref)}",
    ]


def seconds_until(path: Path, lines: int, ranks: list[BaseProcess], began: float) -> float | None:
    """When the file had so many lines; None if all ranks ended before."""
    while any(process.is_alive() for process in ranks):
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return round(time.time() - began, 2)
        time.sleep(0.02)
    return None


if __name__ == "__main__":
    sys.exit(main())
