"""Kill ranks of the tiny job at random moments, and see that the job always ends as if nothing had
happened.

    python tools/kill_points.py --points 20 --folder /tmp/kill_points

Each point starts the same job under torchrun --max-restarts, kills one rank with SIGKILL (every
third time while a checkpoint is being written), lets torchrun restart it, and compares the metrics
of all steps with those of a job that was left alone. One JSON line a point; exit code 1 when one
differs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
ROLES = ("train", "rollout", "rollout", "ref")  # of the ranks of the tiny job
MEASURED = ("time/", "throughput/", "memory/", "publish/gigabytes")  # what a clock measures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/kill_points"))
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    straight = start(args.folder / "straight")
    wait_for_world(straight, args.folder / "straight")
    began = time.monotonic()
    straight.wait()
    duration = time.monotonic() - began
    expected = numbers(args.folder / "straight")
    chance = random.Random(args.seed)
    same = True
    point = 0
    while point < args.points:
        folder = args.folder / f"point_{point:02d}"
        rank = chance.randrange(len(ROLES))
        found = kill(folder, rank, point % 3 == 2, chance.random() * duration)
        if found is None:  # it was over before the moment came
            shutil.rmtree(folder)
            continue
        is_same = numbers(folder) == expected
        found["same"] = is_same
        same = same and is_same
        print(json.dumps({"point": point, "rank": rank, "role": ROLES[rank], **found}), flush=True)
        if is_same:
            shutil.rmtree(folder)
        point += 1
    if same:
        return 0
    return 1


def start(folder: Path) -> subprocess.Popen:
    """Start the job: 8 steps, saved after every second one, beside the training."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--max-restarts",
        "2",
        "--nproc-per-node",
        "4",
        str(ROOT / "r1zero" / "main.py"),
        "--config",
        "tiny",
        f"output_dir={folder}",
        "training.train_iters=8",
        "training.save_interval=2",
        "training.async_save=true",
        "training.eval_data_path=",
    ]
    log = folder.with_suffix(".log").open("w")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)


def wait_for_world(job: subprocess.Popen, folder: Path) -> None:
    """Wait until the ranks have found each other."""
    while job.poll() is None and not (folder / "logs" / "rank_0000.log").exists():
        time.sleep(0.01)


def kill(folder: Path, rank: int, while_saving: bool, delay: float) -> dict[str, object] | None:
    """Run the job, kill a rank once, and wait for the end; returns when that was and what came of
    it."""
    job = start(folder)
    wait_for_world(job, folder)
    time.sleep(0.0 if while_saving else delay)
    while (
        while_saving
        and job.poll() is None
        and not list((folder / "checkpoints").glob(".iter_*.partial"))
    ):
        time.sleep(0.001)
    if job.poll() is not None:
        return None
    victim = next(
        (child for child in psutil.Process(job.pid).children() if is_rank(child, rank)), None
    )
    if victim is None:
        job.wait()
        return None
    steps = len(numbers(folder))
    victim.kill()
    exit_code = job.wait()
    log = folder.with_suffix(".log").read_text(errors="replace")
    return {
        "killed": "while saving" if while_saving else f"after {delay:.1f} s",
        "steps": steps,
        "said": [line for line in log.splitlines() if line.startswith("r1zero: ")],
        "resumed": [
            line.partition(";")[0] for line in log.splitlines() if line.startswith("resumed")
        ],
        "exit_code": exit_code,
    }


def is_rank(process: psutil.Process, rank: int) -> bool:
    try:
        return process.environ().get("RANK") == str(rank)
    except psutil.Error:
        return False


def numbers(folder: Path) -> list[dict[str, float]]:
    """The whole lines of metrics.jsonl, without what a clock measured."""
    path = folder / "metrics.jsonl"
    if path.exists():
        lines = path.read_bytes().split(b"\n")[:-1]
    else:
        lines = []
    result: list[dict[str, float]] = []
    for line in lines:
        result.append(
            {key: value for key, value in json.loads(line).items() if not key.startswith(MEASURED)}
        )
    return result


if __name__ == "__main__":
    sys.exit(main())
