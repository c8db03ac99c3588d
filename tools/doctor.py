#!/usr/bin/env python3
"""Look whether this machine, or all nodes of a job, can run a configuration; name problems and ways
out.

    python tools/doctor.py --config tiny                        this machine, without starting the ranks
    torchrun --nproc-per-node 4 tools/doctor.py --config tiny   also: every planned group adds up a number
    srun -N 2 --ntasks-per-node 8 python tools/doctor.py --config qwen25_7b --seconds 120

Looks at versions, devices, the configuration and its files, folders (writable, room, the same on
all nodes), free memory against the estimate, open files, the compiler of the CPU kernels, and on
NPUs at the environment variables that torch_npu and HCCL read (docs/environment.md). Trains nothing
and leaves nothing behind. A rank that does not come, or gets stuck, is named when `--seconds` are
over. Exit codes: 0 fine, 2 problems.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])

from r1zero.config.command_line import CommandLine
from r1zero.config.load import WrongKeys
from r1zero.config.schema import Config
from r1zero.data.sources import train_sources
from r1zero.distributed.detect import cann_version, device_kind
from r1zero.distributed.launch import (
    ALONE,
    Launch,
    announced_world_size,
    hush_torch,
    launched,
    read_launch,
)
from r1zero.distributed.npu_environment import environment_table, present, set_defaults
from r1zero.distributed.open_files import (
    UNLIMITED,
    allowed_launcher,
    most_allowed,
    raise_limit,
)
from r1zero.distributed.placement import Placement
from r1zero.distributed.process import BAD_INPUT, is_first, refuse
from r1zero.errors import BadInput
from r1zero.preflight import (
    checks,
    machine,
)
from r1zero.preflight.datasets import look_at_data
from r1zero.preflight.environment import Asked, environment_notes, environment_problems
from r1zero.preflight.files import absent, missing_beside_wrong_keys
from r1zero.preflight.found import Found, look
from r1zero.preflight.machine import NodeReport
from r1zero.preflight.outputs import check_outputs, existing
from r1zero.preflight.resolve import load_config
from r1zero.preflight.versions import check_versions, installed
from r1zero.run_folder.folder import check_writable

if TYPE_CHECKING:  # torch is imported when the configuration has been looked at
    import torch
    import torch.distributed as dist

    from r1zero.distributed.groups import World
    from r1zero.distributed.rendezvous import RollCall


@dataclass(frozen=True, slots=True)
class Job:
    """What is looked at: the ranks that were started, or else those that the configuration asks
    for."""

    launch: Launch
    node_of_rank: Sequence[int]  # [world]
    found: Found | None = None  # None when the configuration cannot be read

    @property
    def cfg(self) -> Config | None:
        return None if self.found is None else self.found.config

    @property
    def placed(self) -> Placement | None:
        """None when the roles do not fit the ranks, too."""
        return None if self.found is None else self.found.placement

    @property
    def asked(self) -> Asked:
        """What the run asks of the environment."""
        if self.cfg is None:
            return Asked()
        minutes = self.cfg.training.distributed_timeout_minutes
        graphs = self.cfg.actor_rollout.decode_graphs is not False
        return Asked(wait=timedelta(minutes=minutes), graphs=graphs)

    @property
    def started(self) -> bool:
        return self.launch.launcher != "single"

    @property
    def nodes(self) -> list[tuple[int, int]]:
        """(node, first rank) of each node that a rank of this job looks at."""
        first_of = {
            node: rank for rank, node in reversed(list(enumerate(self.launch.node_of_rank)))
        }
        return sorted(first_of.items())

    def ranks_on(self, node: int) -> list[int]:
        return [rank for rank, where in enumerate(self.node_of_rank) if where == node]


class Findings:
    """What was found, printed as it comes; only one rank of the job prints."""

    def __init__(self, prints: bool) -> None:
        self.problems = 0
        self._prints = prints

    def tell(self, what: str, problems: Sequence[str], fine: str = "") -> None:
        """Print the problems of one check, or that it is fine."""
        self.problems += len(problems)
        for line in problems or [fine]:
            self._say("PROBLEM" if problems else "ok", what, line)

    def note(self, what: str, text: str) -> None:
        """Print what is worth knowing and no problem."""
        self._say("note", what, text)

    def _say(self, verdict: str, what: str, line: str) -> None:
        if self._prints:
            with contextlib.suppress(BrokenPipeError):  # nobody reads any more, as behind `| head`
                print(f"{verdict:8} {what:12} {line}", flush=True)


def main(arguments: list[str]) -> int:
    """Look at everything; returns the exit code."""
    args = parse(arguments)
    try:
        launch = read_launch() if launched() else ALONE
    except BadInput as error:
        return refuse([str(error)], is_first())
    findings = Findings(launch.is_first)
    job = look_at_config(args, launch, findings)
    from r1zero.distributed.log import hush_libraries

    hush_libraries()
    hush_torch()
    from r1zero.distributed.rendezvous import RollCall, open_store

    raise_limit()
    try:
        store = open_store(launch, args.seconds)
    except BadInput as error:
        return refuse([str(error)], prints=True)
    roll = RollCall(store, launch, args.seconds, give_up)
    if missing := roll.call():
        findings.tell(
            "ranks",
            [
                f"{roll.named(missing)} did not come within {args.seconds:g} s; look whether the "
                "launcher started them, and raise --seconds if their nodes are slow"
            ],
        )
        return refuse([], launch.is_first)
    look_at_nodes(job, roll, findings)
    look_at_groups(job, store, roll, findings)
    roll.gather("end", "")  # nobody takes the store away while another still needs it
    if findings.problems and launch.is_first:
        print(f"{findings.problems} problem{'s' if findings.problems > 1 else ''}")
    if findings.problems:
        return BAD_INPUT
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = CommandLine(
        ranks=True,
        description=__doc__,
        usage="%(prog)s [--config CONFIG] [--seconds N] [key.path=value ...]",
    )
    parser.add_argument("--config", default="tiny", help="name of a file under configs/, or a path")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="that a rank may take to answer"
    )
    args = parser.parse_with_overrides(arguments)
    if not 1 <= args.seconds <= 86400:
        parser.error(f"--seconds {args.seconds:g} must be from 1 to 86400, such as 60")
    return args


def give_up(sentence: str) -> None:
    """End this process, which is stuck among ranks that do not answer; the launcher ends the
    others."""
    print(f"{'PROBLEM':8} {'groups':12} {sentence}", flush=True)
    os._exit(BAD_INPUT)


# -- configuration --------------------------------------------------------------------------------


def look_at_config(args: argparse.Namespace, launch: Launch, findings: Findings) -> Job:
    """The configuration, the files it names, and what it makes of the ranks."""
    job = Job(launch, launch.node_of_rank)
    try:
        cfg, warnings = load_config(args.config, args.overrides)
        if job.started:
            size = launch.world_size
        else:
            size = announced_world_size() or cfg.world_size
        found = look(cfg, size, launch.known_nodes)
        problems = checks.check_found(found) + check_outputs(found)
    except WrongKeys as error:
        missing = missing_beside_wrong_keys(error.sound)
        findings.tell("config", [*str(error).splitlines(), *missing])
        return job
    except BadInput as error:
        findings.tell("config", str(error).splitlines())
        return job
    for warning in warnings:
        findings.note("config", warning)
    findings.tell(
        "config",
        list(dict.fromkeys(problems)),
        f"{cfg.name}: keys, model, tokenizer, data and output_dir {cfg.output_dir}",
    )
    if not problems and launch.is_first:
        for line in look_at_data(cfg):
            findings.note("data", line)
    return Job(launch, found.node_of_rank or launch.node_of_rank, found)


# -- nodes ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def token_file(job: Job, folder: Path) -> Iterator[str]:
    """Make a file in the run's folder for the time being; its name, which tells others what to look
    for. Only the first process makes one, where it can; "" elsewhere."""
    if not job.launch.is_first or check_writable("output_dir", str(folder)):
        yield ""
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as token:
        yield token.name


def look_at_nodes(job: Job, roll: RollCall, findings: Findings) -> None:
    """What each node has, and whether they are alike."""
    folder = existing(Path(job.cfg.output_dir if job.cfg is not None else tempfile.gettempdir()))
    with token_file(job, folder) as token:
        name = roll.gather("token", token)[0]
        node = inspect(job, sees_token=not name or Path(name).exists())
        texts = roll.gather("node", json.dumps(asdict(node)))
    everyone = [NodeReport(**json.loads(text)) for text in texts]
    if everyone[0].kind == "npu":
        tell_environment(job, findings)
    for number, rank in job.nodes:
        tell_node(job.cfg, everyone[rank], len(job.ranks_on(number)), findings)
        tell_open_files(job, everyone[rank], number, findings)
    if len(job.nodes) > 1:
        findings.tell(
            "nodes",
            machine.check_alike([everyone[rank] for _, rank in job.nodes]),
            f"{len(job.nodes)} nodes are alike and share {folder}",
        )
    tell_memory(job, everyone, findings)


def inspect(job: Job, sees_token: bool) -> NodeReport:
    """Look at this node."""
    from r1zero.distributed import device
    from r1zero.ops import compiled
    from r1zero.rollout import native

    cfg = job.cfg
    launch = job.launch
    inputs = {}
    kind = device_kind(cfg.training.distributed_backend if cfg is not None else None)
    if cfg is not None:
        actor = cfg.actor_rollout
        missing = absent(cfg)
        paths = {
            "actor_rollout.load": actor.load,
            **{source.key: source.path for source in train_sources(cfg)},
            "ref.load": cfg.ref.load if cfg.has_reference else None,
            "reward.load": cfg.reward.load if cfg.has_reward_model else None,
        }
        inputs = {
            key: machine.fingerprint(path)
            for key, path in paths.items()
            if path and path not in missing
        }
    devices = device.count(kind)
    local = [launch.local_rank] if job.started else list(range(len(job.ranks_on(0))))
    report = NodeReport(
        socket.gethostname(),
        kind,
        devices,
        os.cpu_count() or 1,
        device.free_gigabytes(kind, [index for index in local if index < devices]),
        installed(kind, cann_version()),
        sees_token,
        inputs,
        compiled.load(native.SOURCE)[1] if kind == "cpu" else "",
        files=most_allowed(),
        launcher_files=allowed_launcher() if job.started else UNLIMITED,
    )
    if kind != "npu":
        return report
    return replace(
        report,
        environment=present(),
        environment_problems=environment_problems(os.environ, job.asked),
        environment_notes=environment_notes(os.environ, job.asked),
    )


def tell_environment(job: Job, findings: Findings) -> None:
    """The variables of NPUs, as the first rank has them and a run would have them."""
    for row in environment_table(os.environ, job.asked.wait):
        whose = "as set" if row.is_users else "our default"
        findings.note("environment", f"{row.name}={row.value} ({whose}): {row.meaning}")


def tell_node(cfg: Config | None, node: NodeReport, local_ranks: int, findings: Findings) -> None:
    """Versions, devices and kernels of a node."""
    versions = ", ".join(f"{name} {found}" for name, found in node.versions.items())
    findings.tell(
        "versions", check_versions(node.kind, node.versions), f"{node.host}: {versions}, as tested"
    )
    if node.devices:
        has = f"{node.devices} {node.kind.upper()}s"
    else:
        has = f"{node.cores} CPU cores"
    if cfg is not None:
        problems = machine.check_devices(cfg, node, local_ranks)
    else:
        problems = []
    findings.tell("devices", problems, f"{node.host}: {has} for {local_ranks} ranks")
    if node.kind == "npu":
        findings.tell(
            "environment", node.environment_problems, f"{node.host}: nothing is wrong with these"
        )
        for note in node.environment_notes:
            findings.note("environment", f"{node.host}: {note}")
    if node.kernels:
        findings.note(
            "kernels",
            f"{node.host}: generation will be slower: {node.kernels}; "
            "`apt-get install g++` (12 or newer)",
        )
    elif node.kind == "cpu":
        findings.tell("kernels", [], f"{node.host}: the CPU kernels are compiled")


def tell_open_files(job: Job, node: NodeReport, number: int, findings: Findings) -> None:
    """The limit of open files of a node, if it is too low."""
    size = len(job.node_of_rank)
    has_rank_0 = number == job.node_of_rank[0]
    if problems := machine.check_open_files(node, size, has_rank_0, job.launch.launcher):
        findings.tell("files", problems)


def tell_memory(job: Job, everyone: list[NodeReport], findings: Findings) -> None:
    """Free memory of each node against the estimate of its ranks, where that can be made."""
    if job.found is None:
        return
    needed = machine.needed_gigabytes(job.found, everyone[0].kind)
    if needed is None:
        return
    for number, rank in job.nodes:
        node = everyone[rank]
        for note in machine.memory_notes(job.found.config, node):
            findings.note("memory", note)
        share = {other: needed[other] for other in job.ranks_on(number)}
        if node.kind != "cpu" and job.started:  # each process has told of its own device
            free = []
            for other in share:
                for gigabytes in everyone[other].free_gigabytes:
                    free.append(gigabytes)
            node = replace(node, free_gigabytes=free)
        findings.tell(
            "memory",
            machine.check_memory(node, share),
            f"{node.host}: about {sum(share.values()):.1f} GB for {len(share)} ranks, "
            f"{sum(node.free_gigabytes):.1f} GB free",
        )


# -- groups ---------------------------------------------------------------------------------------


def look_at_groups(job: Job, store: dist.Store, roll: RollCall, findings: Findings) -> None:
    """Make the groups that the run would make, and add a number up in each."""
    if job.cfg is None or job.placed is None:
        return
    launch = job.launch
    size = job.placed.world_size
    if not job.started:
        findings.note(
            "groups",
            f"of the {size} ranks are looked at when they are started: "
            f"torchrun --nproc-per-node {size} tools/doctor.py ...",
        )
        return
    import torch
    import torch.distributed as dist

    from r1zero.distributed import device as devices
    from r1zero.distributed.groups import World

    kind = device_kind(job.cfg.training.distributed_backend)
    if kind == "npu":
        generates = "rollout" in job.placed.roles_of(launch.rank)
        set_defaults(os.environ, generates, job.asked.wait)
    device = devices.open_device(kind, launch.local_rank)
    with roll.stage("making the groups", range(size)):
        try:
            world = World(
                launch,
                job.placed,
                device,
                timedelta(seconds=4 * roll.seconds),
                dist.PrefixStore("doctor", store),
            )
        except BadInput as error:  # the ranks did not find each other
            give_up(str(error))

    def add_up(name: str, group: dist.ProcessGroup, where: torch.device) -> None:
        ranks = dist.get_process_group_ranks(group)
        with roll.stage(f"{name} {ranks}", ranks):
            total = torch.full((1,), float(launch.rank), device=where)
            dist.all_reduce(total, group=group)
            device.synchronize()
        if int(total) != sum(ranks):
            give_up(
                f"{name}: the sum of {ranks} came out as {int(total)}; look at the devices and "
                "links of these ranks"
            )

    each_group(world, add_up)
    with roll.stage("leaving", range(size)):
        world.barrier()
    findings.tell("groups", [], f"{size} ranks: world, and tp, dp, pp and all of every role add up")


def each_group(
    world: World, add_up: Callable[[str, dist.ProcessGroup, torch.device], None]
) -> None:
    """Visit this rank's groups in one order on all ranks, so that none waits for another in a
    circle."""
    import torch

    add_up("world", world.control, torch.device("cpu"))
    for grid in world.roles.values():
        if grid.member:
            assert grid.role_control is not None, "members have it"
            add_up(f"{grid.span.role} control", grid.role_control, torch.device("cpu"))
            for axis, group in sorted(grid.groups.items()):
                add_up(f"{grid.span.role} {axis}", group, world.device.torch)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
