"""Kill a rank of a world of many local ranks at a random point, and see who is named and how soon.

    python tools/kill_ranks.py --times 10                      32 ranks on one node
    python tools/kill_ranks.py --times 10 --nodes 4            the same, said to be on four nodes

Each time the tiny job is forked from one process that has all imports, without a launcher that
would end the others; a rank that is drawn is killed with SIGKILL while it makes its world, prepares,
publishes, is in a step or saves. Every other process must have ended within --seconds, and exactly
one line must name the rank (or, of rank 0, which holds the store, say that it or its node is gone).
One JSON line a time; exit code 1 when one is not so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from ctypes import Array, c_int
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
sys.path.append(str(Path(__file__).resolve().parent))

from bench_world import JOB, fork, split

from r1zero import main as program
from r1zero import trainer
from r1zero.checkpoint.manager import CheckpointManager
from r1zero.distributed.groups import World
from r1zero.runtime import Runtime

POINTS = ("makes its world", "prepares", "publishes", "is in a step", "saves")
LONGEST = 300.0  # seconds that a job may take to get to the point


def main() -> int:
    args = parse()
    chance = random.Random(args.seed)
    size = args.train + args.rollout + args.ref
    fine = True
    for number in range(args.times):
        victim = chance.randrange(size)
        point = POINTS[number % len(POINTS)]
        found = kill(args, victim, point, chance.random())
        fine = fine and bool(found["right"])
        print(
            json.dumps({"time": number, "rank": victim, "killed as it": point, **found}), flush=True
        )
    if fine:
        return 0
    return 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--train", type=int, default=8)
    parser.add_argument("--rollout", type=int, default=16)
    parser.add_argument("--ref", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=1)
    return parser.parse_args()


def local_size(args: argparse.Namespace) -> int:
    """Ranks of a node."""
    return (args.train + args.rollout + args.ref) // args.nodes


def kill(args: argparse.Namespace, victim: int, point: str, delay: float) -> dict[str, object]:
    """Run the job until a rank is at a point, kill it a moment later, and wait for the others."""
    size = args.train + args.rollout + args.ref
    folder = Path(tempfile.mkdtemp(prefix="kill_ranks_"))
    now: Array[c_int] = multiprocessing.RawArray(c_int, size)  # index of the point + 1, by rank
    ranks = fork(size, lambda rank: run_rank(rank, args, folder, now), local_size(args))
    try:
        wait_for(ranks, now, victim, POINTS.index(point) + 1)
        time.sleep(0.3 * delay)
        pid = ranks[victim].pid
        assert pid is not None, "it was started"
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        others = [process for rank, process in enumerate(ranks) if rank != victim]
        for process in others:
            process.join(max(0.0, began + 4 * args.seconds - time.monotonic()))
        seconds = time.monotonic() - began
    finally:
        for process in ranks:
            process.kill()
    lines = (folder / "said").read_text(errors="replace").splitlines()
    said = [line for line in lines if line.startswith("r1zero: ")]
    shutil.rmtree(folder, ignore_errors=True)
    codes = sorted({process.exitcode for process in others}, key=str)
    named = len(said) == 1 and says(said[0], victim)
    right = named and codes == [1] and seconds <= args.seconds
    return {"right": right, "seconds": round(seconds, 1), "said": said, "exit codes": codes}


def says(line: str, victim: int) -> bool:
    """Whether a line names the rank that was killed."""
    return line.startswith(f"r1zero: rank {victim} ") and "without a word" in line


def wait_for(ranks: list[BaseProcess], now: Array[c_int], victim: int, point: int) -> None:
    deadline = time.monotonic() + LONGEST
    while now[victim] != point:
        assert time.monotonic() < deadline, "the job does not get to the point"
        assert all(process.exitcode is None for process in ranks), "a rank ended by itself"
        time.sleep(0.001)


def run_rank(rank: int, args: argparse.Namespace, folder: Path, now: Array[c_int]) -> None:
    """Be one rank of the job, and tell at which point it is."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % local_size(args))}
    sys.argv = ["main.py", "--config", "tiny", f"output_dir={folder / 'run'}", *JOB, *split(args)]
    sys.argv += ["training.train_iters=1000", "training.save_interval=1"]
    said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)

    def told(function: Callable, point: str) -> Callable:
        def wrapped(*arguments: object, **options: object) -> object:
            before = now[rank]
            now[rank] = POINTS.index(point) + 1
            result = function(*arguments, **options)
            now[rank] = before
            return result

        return wrapped

    for owner, name, point in (
        (World, "__init__", "makes its world"),
        (trainer, "prepare", "prepares"),
        (Runtime, "start", "publishes"),
        (trainer, "train_step", "is in a step"),
        (CheckpointManager, "after_step", "saves"),
    ):
        setattr(owner, name, told(getattr(owner, name), point))
    os._exit(program.main())


if __name__ == "__main__":
    sys.exit(main())
