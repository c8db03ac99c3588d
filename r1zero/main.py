"""Entry of every process: parse, join the world, build the crew, loop, leave.

    torchrun --nproc-per-node 4 r1zero/main.py --config tiny
    srun -n 4 python r1zero/main.py --config tiny
    python r1zero/main.py --config tiny                    a world of one: all roles in one process
    python r1zero/main.py --config qwen25_7b --dry-run     what would run where; any machine

Everything that can be wrong in the input is looked for before torch is imported and before any
connection is made: one sentence each, exit code 2.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import timedelta
from pathlib import Path

# A script's own folder must not stand on the path: its files would hide modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from r1zero import checks, dryrun  # noqa: E402
from r1zero.config import Config, nodes, placement  # noqa: E402
from r1zero.loading import load_config  # noqa: E402
from r1zero.observe.folder import check_writable  # noqa: E402
from r1zero.world.launch import Launch, announced_world_size, read_launch  # noqa: E402

BAD_INPUT = 2
LET_FIRST_SPEAK_SECONDS = 3.0


def main() -> int:
    """Run the program; returns the exit code."""
    args = _parse()
    try:
        launch = read_launch()
        cfg, warnings = load_config(args.config, args.overrides)
        size = launch.world_size if launch.launcher != "single" else announced_world_size() or cfg.world_size
        if args.print_world_size:
            print(cfg.world_size)
            return 0
        if args.dry_run or args.check:
            return _look(cfg, warnings, size, args.dry_run)
        node_of_rank = launch.node_of_rank if launch.launcher != "single" else None
        problems = checks.check(cfg, launch.world_size, node_of_rank) or check_writable(cfg.output_dir)
    except ValueError as error:
        return _refuse([str(error)], _is_first())
    if problems:
        return _refuse(problems, launch.speaks)
    return _run(cfg, warnings, launch)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="main.py", description="Train a model with GRPO, R1-Zero style.")
    parser.add_argument("--config", default="tiny", help="name of a file under configs/, or a path")
    parser.add_argument("--dry-run", action="store_true", help="print configuration, placement and memory; run nothing")
    parser.add_argument("--check", action="store_true", help="check the input and stop")
    parser.add_argument("--print-world-size", action="store_true", help="print how many processes the config needs")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. training.train_iters=6")
    return parser.parse_args()


def _look(cfg: Config, warnings: list[str], size: int, report: bool) -> int:
    """Check without a world; with `report` also print what would run. Files of another machine may be missing then."""
    problems = checks.check(cfg, size, None, absent_ok=report)
    if problems:
        return _refuse(problems, True)
    if report:
        print(dryrun.report(cfg, size, nodes(cfg, size)))
        for warning in warnings:
            print(f"warning: {warning}")
    return 0


def _refuse(problems: list[str], speak: bool) -> int:
    """Say what is wrong, once for the whole job."""
    if speak:
        for problem in problems:
            print(f"r1zero: {problem}", file=sys.stderr)
    else:  # a launcher ends the job with its first process: let the one that speaks be heard
        time.sleep(LET_FIRST_SPEAK_SECONDS)
    return BAD_INPUT


def _is_first() -> bool:
    """Whether this process should speak for the job, as far as can be told; a broken environment speaks up."""
    try:
        return read_launch().speaks
    except ValueError:
        return True


def _run(cfg: Config, warnings: list[str], launch: Launch) -> int:
    """Join the world and train. The imports are heavy, and Megatron must come after the device is set."""
    from r1zero.observe.log import hush_libraries

    hush_libraries()
    from r1zero.world import device as devices
    from r1zero.world.failure import FailureWatch
    from r1zero.world.groups import World

    kind = "cpu" if cfg.training.distributed_backend == "gloo" else devices.detect()
    device = devices.prepare(kind, launch.local_rank, cfg.training.deterministic)
    timeout = timedelta(minutes=cfg.training.distributed_timeout_minutes)
    world = World(launch, placement(cfg, launch.world_size), device, timeout)
    watch = FailureWatch(world.store, world.rank, world.roles)
    ready = False
    try:
        from r1zero.training import prepare, train

        crew = prepare(cfg, world, warnings)
        ready = True
        train(crew)
        watch.stop()
        world.leave()
        return 0
    except Exception as error:  # noqa: BLE001 - the edge of the process: tell the other ranks, then end
        bad_input = isinstance(error, ValueError) and not ready
        watch.end_process(error, BAD_INPUT if bad_input else 1)


if __name__ == "__main__":
    sys.exit(main())
