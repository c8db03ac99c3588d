"""The trained model as a Hugging Face folder, which is what the user waits for.

If it cannot be written, the weights still go somewhere, and one sentence says where.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from r1zero.checkpoint.manager import Keeper
from r1zero.checkpoint.state import RunState
from r1zero.errors import BadInput
from r1zero.run_folder.exported import MARK, MODEL, in_the_way, mark
from r1zero.run_folder.owner import plain
from r1zero.weight_sync.gather import gather_tensors
from r1zero.weights.huggingface import save_hf

log = logging.getLogger("r1zero")


def export(crew: RunState, keeper: Keeper) -> None:
    """Write the trained model into the run folder. Collective.

    RuntimeError when that fails: it names the checkpoint or the other folder with the weights.
    """
    folder = Path(crew.cfg.output_dir) / MODEL
    problem = crew.move.from_controller(_obstacle, crew) or _write(crew, crew.folder / MODEL)
    if problem is None:
        return
    told = f"the model could not be written to {folder}: {problem}"
    checkpoint = keeper.keep()
    if checkpoint is not None:
        raise RuntimeError(f"{told}; its weights are in {checkpoint}: when there is room and "
                           "nothing in the way, the same command writes the model without training")
    told += f", nor a checkpoint to {crew.cfg.checkpoints}"
    refuges = crew.move.from_controller(_refuges, crew.cfg.name, crew.progress.step)
    for refuge in refuges:
        if _write(crew, refuge) is None:
            raise RuntimeError(f"{told}; it is in {refuge} now: move it to a safe place")
    raise RuntimeError(f"{told}, nor anything to {', '.join(map(str, refuges))}")


def _obstacle(crew: RunState) -> str | None:
    """What lies where the model belongs: the look before the start may be days ago."""
    crew.hold.check()
    source = crew.cfg.model_folder("actor_rollout")
    return in_the_way(Path(crew.cfg.output_dir) / MODEL, source, may_replace=True)


def _refuges(name: str, step: int) -> list[Path]:
    """New folders in other places, which may have room."""
    places = (os.getcwd(), os.path.expanduser("~"), tempfile.gettempdir())
    unique = f"{Path(name).name}-step-{step}-{os.getpid()}"
    return [Path(place) / unique for place in dict.fromkeys(places)]


def _write(crew: RunState, folder: Path) -> str | None:
    """Write the model to `folder`, tensor by tensor; returns what stood against it. Collective."""
    parameters = crew.policy.model.parameters() if crew.world.train.member else None
    stream = gather_tensors(crew.world, crew.shape, parameters)
    problem = None
    if crew.world.is_controller:
        source = crew.cfg.model_folder("actor_rollout")
        dtype = "bfloat16" if crew.cfg.training.bf16 else "float32"
        beside = {MARK: mark(crew.progress.step)}
        try:
            save_hf(folder, crew.shape, stream, source, dtype, beside=beside, end_ids=crew.ends.ids)
        except (OSError, BadInput) as error:
            problem = getattr(error, "strerror", None) or plain(error)
            log.info("cause", exc_info=True)  # into the log file only
    for _ in stream:  # the other ranks send all of it, whatever becomes of it
        pass
    return crew.move.from_controller(lambda: problem)
