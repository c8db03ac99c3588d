"""Entry point of every rank: parse, resolve, check, join the world, train.

    torchrun --nproc-per-node 4 r1zero/main.py --config tiny
    srun -n 4 python r1zero/main.py --config tiny
    bash launch.sh tiny                                    by node.py, which forks the ranks
    python r1zero/main.py --config tiny                    a world of one: all roles in one process
    python r1zero/main.py --config qwen25_7b --dry-run     what would run where; any machine

Everything that can be wrong in the input is looked for before torch is imported and before any
connection is made: one sentence each, exit code 2.
"""

from __future__ import annotations

import os
import sys

# A script's own folder must not stand on the path: its files, such as types.py, would hide modules
# of the standard library. So this comes before any other import.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # until there is something to save, Ctrl-C just ends this
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from datetime import timedelta
from typing import TYPE_CHECKING

from r1zero.config.command_line import CommandLine
from r1zero.distributed.launch import Launch, announced_world_size, check_interfaces, read_launch
from r1zero.distributed.process import (
    begin,
    end,
    heavy_imports,
    is_first,
    refuse,
    run_rank,
    tell,
)
from r1zero.distributed.shutdown import EXIT_REQUEUE, PreemptionNotice, deadline
from r1zero.errors import BadInput
from r1zero.policy.actor_config import unread_by_loss, unsummed_terms
from r1zero.preflight import checks, dry_run
from r1zero.preflight.cautions import cautions, node_cautions
from r1zero.preflight.datasets import look_at_data
from r1zero.preflight.found import Found, look
from r1zero.preflight.replay import replay_cautions
from r1zero.preflight.resolve import load_config
from r1zero.preflight.run import Run, complete

if TYPE_CHECKING:
    from r1zero.distributed.groups import World
    from r1zero.runtime import Runtime


def main() -> int:
    """Run the program; returns the exit code."""
    args = parse()
    # these start nothing, so no launcher matters
    looks = args.dry_run or args.check or args.print_world_size
    try:
        cfg, warnings = load_config(args.config, args.overrides)
        if args.print_world_size:
            return tell([str(cfg.world_size)])
        if looks:
            found = look(cfg, announced_world_size() or cfg.world_size)
            return tell_of(found, warnings, args.dry_run)
        launch = read_launch()
        found = look(cfg, launch.world_size, launch.known_nodes)
        problems = check_interfaces() + checks.check_found(found)
    except BadInput as error:
        return refuse(str(error).splitlines(), looks or is_first())
    if problems:
        return refuse(problems, launch.is_first, launch.other_node)
    return train_as(launch, complete(found, warnings))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = CommandLine(
        ranks=True,
        prog="main.py",
        description="Train a model with GRPO, R1-Zero style.",
        usage="%(prog)s [--config CONFIG] [flags] [key.path=value ...]",
        epilog=(
            "Other words are overrides, such as training.train_iters=6; the order does not matter."
        ),
    )
    parser.add_argument(
        "--config", action="append", help="name of a file under configs/, or a path; default tiny"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print configuration, placement and memory; run nothing",
    )
    parser.add_argument("--check", action="store_true", help="check the input and stop")
    parser.add_argument(
        "--print-world-size", action="store_true", help="print how many processes the config needs"
    )
    args = parser.parse_with_overrides()
    if args.config is not None and len(args.config) > 1:  # one of them would be ignored
        parser.error(
            f"--config is given {len(args.config)} times, as {' and '.join(args.config)}; keep one"
        )
    if args.config:
        args.config = args.config[0]
    else:
        args.config = "tiny"
    return args


def tell_of(found: Found, warnings: list[str], report: bool = False) -> int:
    """Check without a world; with `report` also print what would run. Files of another machine may
    be missing then."""
    cfg = found.config
    problems = checks.check_found(found, absent_ok=report)
    if not report:
        problems = check_interfaces() + problems
    if problems:
        return refuse(problems, True)
    lines = []
    if report:
        lines.append(dry_run.report(found))
        told = (
            warnings
            + unread_by_loss(cfg.algorithm, cfg.actor_rollout)
            + unsummed_terms(cfg.algorithm, cfg.actor_rollout)
            + cautions(cfg)
            + node_cautions(found)
            + replay_cautions(cfg, found.actor.shape)
        )
        lines += [f"warning: {warning}" for warning in told]
    return tell(lines + look_at_data(cfg))


def train_as(launch: Launch, run: Run) -> int:
    """Join the world and train."""

    def start(world: World) -> Runtime | None:
        with heavy_imports():
            from r1zero.trainer import prepare

        return prepare(run, world)

    def work(runtime: Runtime | None) -> int:
        from r1zero.trainer import train

        if train(runtime, notice):
            return EXIT_REQUEUE
        return 0

    training = run.config.training
    notice = PreemptionNotice(deadline(training.exit_before))
    notice.listen()
    return run_rank(
        launch,
        run.placement,
        timedelta(minutes=training.distributed_timeout_minutes),
        training.distributed_backend == "gloo",
        training.deterministic,
        start,
        work,
    )


if __name__ == "__main__":
    begin()
    end(main())
