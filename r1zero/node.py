"""Entry point of a node, for launch.sh: check the input, import what the ranks share, fork them.

    python r1zero/node.py r1zero/main.py --config tiny [key.path=value ...]
    python r1zero/node.py --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr HOST --master-port 29500
        r1zero/main.py --config qwen25_7b

The ranks are those of `torchrun r1zero/main.py`, but start sooner: what torchrun has each of them do is
done once.
"""

from __future__ import annotations

import os
import sys

# as in main.py: the script's own folder must not stand on the path
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import importlib
import signal
import threading

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from r1zero import main as program
from r1zero.config.schema import Config
from r1zero.distributed.forked import ForkedRank, fork
from r1zero.distributed.launch import read_launch
from r1zero.distributed.process import begin, end, refuse
from r1zero.distributed.shared_imports import import_shared
from r1zero.distributed.spawn import (
    Ranks,
    forward_signals,
    parse,
    port_problem,
    rank_environments,
)
from r1zero.errors import BadInput
from r1zero.preflight.found import look
from r1zero.preflight.resolve import load_config
from r1zero.preflight.run import complete


def main() -> int:
    """Run the ranks of this node; returns the exit code."""
    node = parse(sys.argv[1:], counted=False)
    sys.argv = node.program
    args = program.parse()
    try:
        cfg, warnings = load_config(args.config, args.overrides)
        node.nproc_per_node = node.nproc_per_node or _ranks_of_a_node(cfg, node.nnodes)
    except BadInput as error:
        return refuse(str(error).splitlines(), True)
    if problem := port_problem(node):
        return refuse([problem], True)
    # In a child, since the user's own code is tried there: what it leaves behind is no rank's.
    check = fork(lambda: _check(cfg, node), {})
    waits = threading.Thread(target=_end_if_refused, args=(check,))
    waits.start()
    import_shared(cfg.training.distributed_backend, _import_program)
    waits.join()  # a fork takes along no thread
    print(
        f"launch: starting {node.nproc_per_node} processes on each of {node.nnodes} node(s): "
        f"{' '.join([args.config, *args.overrides])}"
    )

    def start_rank(environment: dict[str, str]) -> ForkedRank:
        return fork(lambda: _be_rank(cfg, warnings), environment)

    ranks = Ranks()
    forward_signals(ranks)
    ranks.start(start_rank, rank_environments(node))
    return ranks.wait()


def _ranks_of_a_node(cfg: Config, nodes: int) -> int:
    """BadInput when the ranks that the configuration asks for cannot be shared equally."""
    if cfg.world_size % nodes:
        raise BadInput(
            f"{cfg.name} asks for {cfg.world_size} ranks, which NNODES={nodes} does not divide; set "
            "NPROC_PER_NODE"
        )
    return cfg.world_size // nodes


def _check(cfg: Config, node: argparse.Namespace) -> int:
    """Say what is wrong, and what is worth knowing; returns the exit code."""
    size = node.nnodes * node.nproc_per_node
    node_of_rank = [rank // node.nproc_per_node for rank in range(size)]
    try:
        return program.tell_of(look(cfg, size, node_of_rank), [])
    except BadInput as error:
        return refuse(str(error).splitlines(), True)


def _end_if_refused(check: ForkedRank) -> None:
    """At once, whatever this process is importing."""
    if code := check.wait():
        end(code if code > 0 else 128 - code)


def _import_program() -> None:
    """What a rank imports, now or by its first step."""
    for name in (
        "megatron.core.models.gpt.gpt_layer_specs",
        "numpy.ma",
        "numpy.random",
        "pyarrow.dataset",
        "r1zero.trainer",
    ):
        importlib.import_module(name)


def _be_rank(cfg: Config, warnings: list[str]) -> int:
    launch = read_launch()
    found = look(cfg, launch.world_size, launch.known_nodes)
    return program.train_as(launch, complete(found, warnings))


if __name__ == "__main__":
    begin()
    end(main())
