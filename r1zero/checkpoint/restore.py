"""Go on from a checkpoint: every rank takes back its part, and one line says what that was."""

from __future__ import annotations

import logging
from pathlib import Path

from safetensors.torch import load_file

from r1zero.checkpoint import manifest
from r1zero.checkpoint import store
from r1zero.checkpoint.progress import Record
from r1zero.checkpoint.resume import changes
from r1zero.checkpoint.state import RunState
from r1zero.errors import BadInput
from r1zero.config.load import dump
from r1zero.checkpoint.train_state import load_policy, set_rng_states
from r1zero.distributed.groups import World
from r1zero.distributed.transfer import Mover

log = logging.getLogger("r1zero")


def verify(world: World, folder: Path) -> None:
    """Compare every file with its sum, the ranks sharing the work. Collective. BadInput on all if one differs."""
    names, problem = sorted(manifest.read(folder)), None
    try:
        manifest.check_sums(folder, names[world.rank::world.size])
    except BadInput as error:
        problem = str(error)
    problem = next(filter(None, Mover(world).gather(problem)), None)
    if problem is not None:
        raise BadInput(f"{problem}{store.way_out(folder)}")


def restore(crew: RunState, folder: Path) -> None:
    """Bring the crew where the checkpoint was saved. Collective over the world. BadInput when it does not fit."""
    record = Record.read(folder)
    crew.progress = record.progress
    span = crew.world.train.span
    layout = {"tp": span.tp, "pp": span.pp, "dp": span.dp}
    same_layout = layout == record.layout
    if crew.world.train.member:
        load_policy(crew.policy, folder, record.updates)
        crew.policy.kl.value = record.kl_coefficient
        if same_layout:
            set_rng_states(crew.policy, load_file(folder / "rng.safetensors"))
    crew.move.settle()
    if crew.world.is_controller:
        log.info(_line(crew, folder, record, layout))
        for change in changes(dump(crew.cfg), folder):
            log.info("changed since then: %s", change)


def _line(crew: RunState, folder: Path, record: Record, layout: dict[str, int]) -> str:
    """Say what was restored."""

    def shown(grid: dict[str, int]) -> str:
        return " ".join(f"{axis.upper()}{size}" for axis, size in grid.items())

    done, control = record.progress, crew.cfg.algorithm.kl_ctrl
    where = shown(layout) if layout == record.layout else f"saved at {shown(record.layout)}, now {shown(layout)}"
    rng = "random states" if layout == record.layout else "random states begun anew (they belong to a layout)"
    return (f"resumed from {folder}: step {done.step} of {crew.cfg.training.train_iters}; model and optimizer "
            f"({where}), learning-rate schedule at update {record.updates}, KL coefficient {record.kl_coefficient:g} "
            f"({control.type}), {rng}, data at prompt {done.prompts_drawn}, weights version {done.weights_version}; "
            f"the reference stays {crew.cfg.ref.load}")
