#!/usr/bin/env python3
"""Count what a world would ask of each of its ranks, for any number of ranks and without any.

    python tools/scale.py --config qwen25_7b                     # as the configuration has it
    python tools/scale.py --config qwen25_7b --ranks 16 256      # its roles in proportion
    python tools/scale.py --model 72b --train 2048 --train-tp 8 --train-pp 8 --rollout 4096 --rollout-tp 8
    python tools/scale.py --model qwen3_235b --train 128 --train-tp 4 --train-pp 8 --train-ep 16 --rollout 32 \
        --rollout-tp 4 --rollout-ep 16 --train-layers 11 12 12 12 12 12 12 11
    python tools/scale.py --model deepseek_v3 --train 512 --train-tp 8 --train-pp 16 --rollout 512 --rollout-tp 32

Real code over simulated ranks: the placement, the list of groups, the plan of publishing. Of each role
the rank with the most is shown; what the columns mean is in docs/scale.md. Other words are overrides
of the configuration, such as actor_rollout.n_samples_per_prompt=16. --json prints one JSON line for
each world instead. Exit code 2 for a world that cannot be.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
sys.path.insert(1, str(Path(__file__).resolve().parent))

from known_models import (
    LAYERS,
    QWEN3_30B_A3B,
    QWEN3_235B_A22B,
    QWEN25_7B,
    QWEN25_32B,
    QWEN25_72B,
    deepseek_v3,
    tensors_of,
)

from r1zero.config.command_line import CommandLine
from r1zero.config.schema import Config, role_sizes
from r1zero.distributed.npu_environment import present, tensor_megabytes
from r1zero.distributed.placement import Placement, RankGrid, RoleSize, place
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.params import ParamSpec, param_table
from r1zero.preflight.dry_run import aligned
from r1zero.preflight.found import dtype_of, look
from r1zero.preflight.replay import route_bytes
from r1zero.preflight.resolve import load_config
from r1zero.preflight.scale import Load, Network, Scale, count, scale_table

ROLES = ("train", "rollout", "ref")
BF16_BYTES = 2
BUCKET_MEGABYTES = 64


NETWORKS: dict[str, Callable[[], Network]] = {
    "7b": lambda: _network(tensors_of(QWEN25_7B), 28),
    "32b": lambda: _network(tensors_of(QWEN25_32B), 64),
    "72b": lambda: _network(tensors_of(QWEN25_72B), 80),
    "qwen3_30b": lambda: _network(tensors_of(QWEN3_30B_A3B), 48),
    "qwen3_235b": lambda: _network(tensors_of(QWEN3_235B_A22B), 94),
    "deepseek_v3": lambda: _network(deepseek_v3(), LAYERS),
}


def main() -> int:
    """Count one world or several; returns the exit code."""
    args = parse()
    try:
        for world in worlds(args):
            scale = count(
                world.placed,
                world.placed.rollout,
                world.network,
                world.load,
                world.bucket_megabytes,
                tensor_megabytes(present()),
            )
            if args.json:
                print(json.dumps({"model": world.name, **asdict(scale)}))
            else:
                print(told(world, scale))
    except BadInput as error:
        print(f"scale: {error}", file=sys.stderr)
        return 2
    return 0


def parse() -> argparse.Namespace:
    parser = CommandLine(prog="scale.py", description=__doc__)
    parser.add_argument("--config", help="name of a file under configs/, or a path")
    parser.add_argument(
        "--model", choices=NETWORKS, help="a built-in model in place of the config's"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[], help="worlds of so many ranks")
    for role in ROLES:
        parser.add_argument(f"--{role}", type=int, help=f"ranks of {role}")
        parser.add_argument(f"--{role}-tp", type=int, help="its tensor parallel size")
        parser.add_argument(f"--{role}-ep", type=int, help="its expert parallel size")
        if role != "rollout":
            parser.add_argument(f"--{role}-pp", type=int, help="its pipeline parallel size")
            parser.add_argument(
                f"--{role}-layers", type=int, nargs="+", help="layers of each of its stages"
            )
    parser.add_argument("--cp", type=int, help="context parallel size of train and ref")
    parser.add_argument(
        "--prompts", type=int, help="in a global batch; default 512 or the config's"
    )
    parser.add_argument(
        "--group", type=int, help="responses of a prompt; default 16 or the config's"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        help="of a response; default 8192 or the longest that the config allows",
    )
    parser.add_argument("--json", action="store_true", help="one JSON line for each world")
    args = parser.parse_with_overrides()
    if args.config is None and (args.model is None or not args.train or not args.rollout):
        parser.error("name a --config, or a --model with --train and --rollout")
    for name, value in vars(args).items():
        if name.endswith(("tp", "pp", "ep", "cp")) and value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: {value} must be at least 1")
    if args.config is None and args.overrides:
        parser.error(f"{args.overrides[0]} is of a configuration; name it with --config")
    return args


@dataclass(frozen=True, slots=True)
class World:
    """What is counted."""

    name: str
    placed: Placement
    network: Network
    load: Load
    bucket_megabytes: int


def worlds(args: argparse.Namespace) -> Iterator[World]:
    """Every world that is asked for."""
    name = args.model
    bucket = BUCKET_MEGABYTES
    load = Load(groups=512, group_size=16, tokens=8192)
    sizes = {}
    network = None
    if args.config is not None:
        cfg, _ = load_config(args.config, args.overrides)
        name = name or cfg.name
        bucket = cfg.training.publish_bucket_megabytes
        load = load_of(cfg, look(cfg).actor.shape)
        sizes = role_sizes(cfg)
        if args.model is None:
            network = network_of(cfg)
    load = Load(
        groups=args.prompts or load.groups,
        group_size=args.group or load.group_size,
        tokens=args.tokens or load.tokens,
        prompt_tokens=load.prompt_tokens,
        route_bytes=load.route_bytes,
    )
    sizes = overridden(sizes, args)
    network = network or NETWORKS[args.model]()
    for asked in args.ranks or [sum(size.ranks for size in sizes.values())]:
        placed = place(in_proportion(sizes, asked), colocate=False)
        yield World(name, placed, network, load, bucket)


def load_of(cfg: Config, shape: ModelConfig | None) -> Load:
    """The samples of a step, all of them as long as they may be."""
    return Load(
        groups=cfg.training.global_batch_size,
        group_size=cfg.actor_rollout.n_samples_per_prompt,
        tokens=cfg.response_budget,
        prompt_tokens=cfg.actor_rollout.max_prompt_length,
        route_bytes=0 if shape is None else route_bytes(cfg, shape),
    )


def network_of(cfg: Config) -> Network:
    """The model of a configuration. BadInput where its shape is not known here."""
    shape = look(cfg).actor.shape
    if shape is None:
        raise BadInput(
            f"actor_rollout.load: {cfg.actor_rollout.load} is not on this machine, and no model file "
            "tells its shape; name one of the built-in models with --model"
        )
    return Network(
        tensors=param_table(shape),
        num_layers=shape.num_layers,
        element_size=dtype_of(cfg).itemsize,
    )


def _network(tensors: list[ParamSpec], num_layers: int) -> Network:
    return Network(tensors=tensors, num_layers=num_layers, element_size=BF16_BYTES)


def overridden(sizes: dict[str, RoleSize], args: argparse.Namespace) -> dict[str, RoleSize]:
    """The roles with what the flags say of them; one that nobody names is left out."""
    found = {}
    for role in ROLES:
        size = sizes.get(role, RoleSize(0))
        given = {name: getattr(args, f"{role}_{name}") for name in ("tp", "ep")}
        given["ranks"] = getattr(args, role)
        if role != "rollout":
            given["pp"] = getattr(args, f"{role}_pp")
            given["num_layer_list"] = getattr(args, f"{role}_layers")
            given["cp"] = args.cp
        size = replace(size, **{key: value for key, value in given.items() if value is not None})
        stages = len(size.num_layer_list)
        if stages not in (0, size.pp):
            raise BadInput(
                f"--{role}-layers: {list(size.num_layer_list)} must have a number for each of the "
                f"{size.pp} pipeline stages; give as many"
            )
        if size.ranks:
            found[role] = replace(size, num_layer_list=tuple(size.num_layer_list))
    return found


def in_proportion(sizes: dict[str, RoleSize], ranks: int) -> dict[str, RoleSize]:
    """Roles in a world of about so many ranks: whole replicas, at least one, and as many as hold all
    experts, as near to their shares as can be. What is left goes to rollout.

    >>> sizes = {"train": RoleSize(8, 2, 4), "rollout": RoleSize(6, 2), "ref": RoleSize(2, 2)}
    >>> [size.ranks for size in in_proportion(sizes, 256).values()]
    [128, 96, 32]
    """
    total = sum(size.ranks for size in sizes.values())
    found = {}
    for role, size in sizes.items():
        replica = math.lcm(size.tp * size.cp, size.ep) * size.pp
        found[role] = replace(
            size, ranks=replica * max(1, round(size.ranks / replica * ranks / total))
        )
    others = sum(size.ranks for role, size in found.items() if role != "rollout")
    rollout = found["rollout"]
    unit = math.lcm(rollout.tp, rollout.ep)
    left = (ranks - others) // unit * unit
    if left < 1:
        raise BadInput(
            f"--ranks: {ranks} are too few for one replica of each role; {others + unit} would work"
        )
    return found | {"rollout": replace(rollout, ranks=left)}


def cuts(grid: RankGrid) -> str:
    """How a role cuts its model: TP, PP and DP, and what else it has more than one of."""
    sizes = [f"TP {grid.tp}", f"PP {grid.pp}", f"DP {grid.dp}"]
    if grid.cp > 1:
        sizes.append(f"CP {grid.cp}")
    if grid.ep > 1 and (grid.role != "rollout" or grid.experts_span_replicas):
        sizes.append(f"EP {grid.ep}")
    return ", ".join(sizes)


def told(world: World, scale: Scale) -> str:
    """A table for people."""
    grids = ", ".join(f"{grid.role} {grid.size} ({cuts(grid)})" for grid in world.placed.grids)
    load = world.load
    return "\n".join(
        [
            f"{world.name} on {scale.world_size} ranks: {grids}",
            f"{load.samples} samples of {load.tokens} tokens a step",
            aligned(scale_table(scale)),
            f"all ranks together make {scale.groups} groups and {scale.publish_groups} for publishing",
            f"publishing: {scale.pieces} pieces, planned in {scale.plan_seconds:.2f} s",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
