"""The engine on the real vLLM, run by the Python of an environment that has it: FOLDER MODEL STEPS.

Forks ranks from one process that has imported vLLM, which takes some 20 seconds. Prints one JSON
line: what the last step of both engines measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from support.multiproc import run_ranks
from support.vllm_runs import agree, drawn, engine_of, fill, same_runs, train_body
from support.worlds import make_world

from r1zero.distributed.variables import set_variables
from r1zero.rollout.vllm.engine import NEEDED, WISHED


def weights_body(rank: int, size: int, store: object, model: Path) -> list[bool]:
    """Whether samples are those of the native engine, with each of three publications."""
    world = make_world(rank, size, store, (1, 1), rollout=size)
    ours, native = (engine_of(name, model, world) for name in ("vllm", "native"))
    found = []
    for version in range(3):
        for engine in (ours, native):
            fill(engine, model, world, version)
        found.append(agree(drawn(ours, version), drawn(native, version)))
    return found


def main() -> None:
    folder, model, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    set_variables(NEEDED, WISHED)
    import r1zero.rollout.vllm.host  # noqa: F401 - so that ranks have it when they are forked

    for tp in (1, 2):
        assert run_ranks(weights_body, tp, model) == [[True] * 3] * tp, f"TP {tp}"
    print(json.dumps(same_runs(train_body, model, folder, steps)))


if __name__ == "__main__":
    main()
