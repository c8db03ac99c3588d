#!/usr/bin/env python3
"""Look whether this machine, or all nodes of a job, can run a configuration; name every problem and its way out.

    python tools/doctor.py --config tiny                        this machine, without starting the ranks
    torchrun --nproc-per-node 4 tools/doctor.py --config tiny   also: every planned group of ranks adds up a number
    srun -N 2 --ntasks-per-node 8 python tools/doctor.py --config qwen25_7b --seconds 120

Looks at versions, devices, the configuration and its files, folders (writable, room, the same on all nodes), free
memory against the estimate, and the compiler of the CPU kernels. Trains nothing and leaves nothing behind. A rank
that does not come, or gets stuck, is named when `--seconds` are over. Exit codes: 0 fine, 2 problems.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from r1zero import checks  # noqa: E402
from r1zero.config import Config, nodes, placement  # noqa: E402
from r1zero.inputs import absent, check_inputs  # noqa: E402
from r1zero.loading import load_config  # noqa: E402
from r1zero.observe.folder import check_writable  # noqa: E402
from r1zero.preflight import machine  # noqa: E402
from r1zero.preflight.machine import Node  # noqa: E402
from r1zero.preflight.versions import check_versions, installed  # noqa: E402
from r1zero.process import BAD_INPUT, is_first, refuse  # noqa: E402
from r1zero.world.launch import Launch, announced_world_size, hush_torch, read_launch  # noqa: E402
from r1zero.world.roles import Placement  # noqa: E402


class Findings:
    """What was found, printed as it comes; only one rank of the job speaks."""

    def __init__(self, speaks: bool) -> None:
        self.problems, self._speaks = 0, speaks

    def tell(self, what: str, problems: list[str], fine: str) -> None:
        """Print the problems of one check, or that it is fine."""
        self.problems += len(problems)
        if self._speaks:
            for line in problems or [fine]:
                print(f"{'PROBLEM' if problems else 'ok':8} {what:12} {line}", flush=True)

    def note(self, what: str, text: str) -> None:
        """Print what is worth knowing and no problem."""
        if self._speaks:
            print(f"{'note':8} {what:12} {text}", flush=True)


def main(arguments: list[str]) -> int:
    """Look at everything; returns the exit code."""
    args = parse(arguments)
    try:
        launch = read_launch()
    except ValueError as error:
        return refuse([str(error)], is_first())
    findings = Findings(launch.speaks)
    cfg = look_at_config(args, launch, findings)
    from r1zero.observe.log import hush_libraries

    hush_libraries()
    hush_torch()
    from r1zero.world.rollcall import RollCall, open_store

    try:
        store = open_store(launch, args.seconds)
    except ValueError as error:
        return refuse([str(error)], speak=True)
    roll = RollCall(store, launch, args.seconds, give_up)
    if missing := roll.call():
        findings.tell("ranks", [f"{roll.named(missing)} did not come within {args.seconds:g} s; look whether the "
                                "launcher started them, and raise --seconds if their nodes are slow"], "")
        return refuse([], launch.speaks)
    look_at_nodes(cfg, launch, roll, findings)
    if cfg is not None:
        look_at_groups(cfg, launch, store, roll, findings)
    roll.gather("end", "")  # nobody takes the store away while another still needs it
    if findings.problems and launch.speaks:
        print(f"{findings.problems} problem{'s' if findings.problems > 1 else ''}")
    return BAD_INPUT if findings.problems else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", help="name of a file under configs/, or a path")
    parser.add_argument("--seconds", type=float, default=60.0, help="that a rank may take to answer")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    return parser.parse_args(arguments)


def give_up(sentence: str) -> None:
    """End this process, which is stuck among ranks that do not answer; the launcher ends the others."""
    print(f"{'PROBLEM':8} {'groups':12} {sentence}", flush=True)
    os._exit(BAD_INPUT)


def look_at_config(args: argparse.Namespace, launch: Launch, findings: Findings) -> Config | None:
    """The configuration and the files it names; None when it cannot be read."""
    try:
        cfg, warnings = load_config(args.config, args.overrides)
    except ValueError as error:
        findings.tell("config", str(error).splitlines(), "")
        return None
    for warning in warnings:
        findings.note("config", warning)
    node_of_rank = None if launch.launcher == "single" else launch.node_of_rank
    problems = checks.check(cfg, world_size(cfg, launch), node_of_rank)
    if checks.check_values(cfg):
        problems += check_inputs(cfg)  # which `check` leaves out when single values are wrong
    problems += [problem for problem in checks.check_outputs(cfg) or machine.check_disk(cfg) if problem not in problems]
    findings.tell("config", problems, f"{cfg.name}: keys, model, tokenizer, data and output_dir "
                                      f"{cfg.output_dir}")
    return cfg


def world_size(cfg: Config, launch: Launch) -> int:
    """Ranks of the job that is looked at: those that were started, or else those that the configuration asks for."""
    return launch.world_size if launch.launcher != "single" else announced_world_size() or cfg.world_size


def planned(cfg: Config, size: int) -> Placement | None:
    try:
        return placement(cfg, size)
    except ValueError:
        return None  # look_at_config said why


def look_at_nodes(cfg: Config | None, launch: Launch, roll, findings: Findings) -> None:  # noqa: ANN001
    """What each node has, and whether they are alike."""
    folder = machine.existing(Path(cfg.output_dir)) if cfg is not None else Path(tempfile.gettempdir())
    token = None
    if launch.speaks and not check_writable("", str(folder)):
        token = tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-")
    [name, *_] = roll.gather("token", token.name if token else "")
    size = world_size(cfg, launch) if cfg is not None else launch.world_size
    node_of_rank = launch.node_of_rank if launch.launcher != "single" else nodes(cfg, size) if cfg is not None else [0]
    mine = node_of_rank[launch.rank]
    local = range(node_of_rank.count(mine)) if launch.launcher == "single" else [launch.local_rank]
    node = inspect(cfg, local, not name or Path(name).exists())
    everyone = [Node(**json.loads(text)) for text in roll.gather("node", json.dumps(asdict(node)))]
    if token is not None:
        token.close()
    first_of = {number: rank for rank, number in reversed(list(enumerate(launch.node_of_rank)))}
    for number, rank in sorted(first_of.items()):
        tell_node(cfg, everyone[rank], node_of_rank.count(number), findings)
    if len(first_of) > 1:
        findings.tell("nodes", machine.check_alike([everyone[rank] for _, rank in sorted(first_of.items())]),
                      f"{len(first_of)} nodes are alike and share {folder}")
    placed = planned(cfg, size) if cfg is not None else None
    needed = machine.needed_gigabytes(cfg, placed) if placed is not None else None
    if needed is not None:
        tell_memory(needed, node_of_rank, everyone, first_of, findings)


def inspect(cfg: Config | None, local: range | list[int], sees_token: bool) -> Node:
    """Look at this node."""
    import socket

    from r1zero.rollout import native
    from r1zero.world import device

    asked = cfg.training.distributed_backend if cfg is not None else None
    kind = "cpu" if asked == "gloo" else device.detect()
    inputs = {}
    if cfg is not None:
        paths = {"actor_rollout.load": cfg.actor_rollout.load, "actor_rollout.data_path": cfg.actor_rollout.data_path,
                 "ref.load": cfg.ref.load}
        inputs = {key: machine.look_of(path) for key, path in paths.items() if path and path not in absent(cfg)}
    devices = device.count(kind)
    return Node(socket.gethostname(), kind, devices, os.cpu_count() or 1,
                device.free_gigabytes(kind, [index for index in local if index < devices]),
                installed(kind, device.cann_version()), sees_token, inputs, native.load()[1] if kind == "cpu" else "")


def tell_node(cfg: Config | None, node: Node, local_ranks: int, findings: Findings) -> None:
    versions = ", ".join(f"{name} {found}" for name, found in node.versions.items())
    findings.tell("versions", check_versions(node.kind, node.versions), f"{node.host}: {versions}, as tested")
    has = f"{node.devices} {node.kind.upper()}s" if node.devices else f"{node.cores} CPU cores"
    problems = machine.check_devices(cfg, node, local_ranks) if cfg is not None else []
    findings.tell("devices", problems, f"{node.host}: {has} for {local_ranks} ranks")
    if node.kernels:
        findings.note("kernels", f"{node.host}: generation will be slower: {node.kernels}; `apt-get install "
                                 "g++` (12 or newer)")
    elif node.kind == "cpu":
        findings.tell("kernels", [], f"{node.host}: the CPU kernels are compiled")


def tell_memory(needed: list[float], node_of_rank: list[int] | tuple[int, ...], everyone: list[Node],
                first_of: dict[int, int], findings: Findings) -> None:
    for number, rank in sorted(first_of.items()):
        ranks = [other for other, node in enumerate(node_of_rank) if node == number]
        node = everyone[rank]
        if node.kind != "cpu" and len(everyone) > 1:  # each process has told of its own device
            node = Node(**asdict(node) | {"free_gigabytes": [everyone[other].free_gigabytes[0] for other in ranks]})
        share = {other: needed[other] for other in ranks}
        free = node.free_gigabytes if node.kind != "cpu" else node.free_gigabytes[:1]
        findings.tell("memory", machine.check_memory(node, share),
                      f"{node.host}: about {sum(share.values()):.1f} GB for {len(ranks)} ranks, "
                      f"{sum(free):.1f} GB free")


def look_at_groups(cfg: Config, launch: Launch, store, roll, findings: Findings) -> None:  # noqa: ANN001
    """Make the groups that the run would make, and add a number up in each."""
    placed = planned(cfg, launch.world_size)
    if launch.launcher == "single":
        findings.note("groups", f"of the {world_size(cfg, launch)} ranks are looked at when they are "
                                "started: "
                                f"torchrun --nproc-per-node {world_size(cfg, launch)} tools/doctor.py ...")
        return
    if placed is None:
        return
    import torch
    import torch.distributed as dist

    from r1zero.world import device as devices
    from r1zero.world.groups import World

    kind = "cpu" if cfg.training.distributed_backend == "gloo" else devices.detect()
    device = devices.open_device(kind, launch.local_rank)
    everyone = range(launch.world_size)
    with roll.stage("making the groups", everyone):
        world = World(launch, placed, device, timedelta(seconds=4 * roll.seconds), dist.PrefixStore("doctor", store))

    def add_up(name: str, group: dist.ProcessGroup, where: torch.device) -> None:
        ranks = dist.get_process_group_ranks(group)
        with roll.stage(f"{name} {ranks}", ranks):
            total = torch.full((1,), float(launch.rank), device=where)
            dist.all_reduce(total, group=group)
            device.synchronize()
        assert int(total) == sum(ranks), f"{name}: the sum of {ranks} came out as {int(total)}"

    each_group(world, add_up)
    with roll.stage("leaving", everyone):
        world.barrier()
    findings.tell("groups", [], f"{launch.world_size} ranks: world, and tp, dp, pp and all of every role "
                                "add up")


def each_group(world, add_up: Callable) -> None:  # noqa: ANN001 - World comes with torch
    """Visit this rank's groups in one order on all ranks, so that none waits for another in a circle."""
    import torch

    add_up("world", world.control, torch.device("cpu"))
    for grid in world.grids:
        if grid.member:
            add_up(f"{grid.span.role} control", grid.role_control, torch.device("cpu"))
            for axis, group in sorted(grid.groups.items()):
                add_up(f"{grid.span.role} {axis}", group, world.device.torch)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
