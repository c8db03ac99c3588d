"""Export of the trained model as a Hugging Face folder, which is what the user waits for.

If it cannot be written, the weights still go somewhere, and one sentence says where.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from r1zero.checkpoint.manager import CheckpointManager
from r1zero.checkpoint.state import RunState
from r1zero.errors import BadInput
from r1zero.run_folder.exported import MARK, MODEL, in_the_way, mark
from r1zero.run_folder.owner import plain
from r1zero.weight_sync.gather import gather_tensors
from r1zero.weights.huggingface import save_hf

log = logging.getLogger("r1zero")


def export(runtime: RunState, manager: CheckpointManager) -> None:
    """Write the trained model into the run folder. Collective.

    RuntimeError when that fails: it names the checkpoint or the other folder with the weights.
    """
    folder = runtime.checkpoint_config.model
    problem = runtime.move.from_controller(_obstacle, runtime) or _write(
        runtime, runtime.folder / MODEL
    )
    if problem is None:
        return
    told = f"the model could not be written to {folder}: {problem}"
    checkpoint = manager.keep()
    if checkpoint is not None:
        raise RuntimeError(
            f"{told}; its weights are in {checkpoint}: when there is room and "
            "nothing in the way, the same command writes the model without training"
        )
    told += f", nor a checkpoint to {runtime.checkpoint_config.folder}"
    name = runtime.checkpoint_config.run_name
    refuges = runtime.move.from_controller(_refuges, name, runtime.progress.step)
    for refuge in refuges:
        if _write(runtime, refuge) is None:
            raise RuntimeError(f"{told}; it is in {refuge} now: move it to a safe place")
    raise RuntimeError(f"{told}, nor anything to {', '.join(map(str, refuges))}")


def _obstacle(runtime: RunState) -> str | None:
    """What lies where the model belongs: the look before the start may be days ago."""
    runtime.hold.check()
    config = runtime.checkpoint_config
    return in_the_way(config.model, config.model_source, may_replace=True)


def _refuges(name: str, step: int) -> list[Path]:
    """New folders in other places, which may have room."""
    places = (os.getcwd(), os.path.expanduser("~"), tempfile.gettempdir())
    unique = f"{Path(name).name}-step-{step}-{os.getpid()}"
    return [Path(place) / unique for place in dict.fromkeys(places)]


def _write(runtime: RunState, folder: Path) -> str | None:
    """Write the model to `folder`, tensor by tensor; returns what stood against it. Collective."""
    stream = gather_tensors(runtime.world, runtime.shape, runtime.policy.parameters())
    problem = None
    if runtime.world.is_controller:
        config = runtime.checkpoint_config
        beside = {MARK: mark(runtime.progress.step)}
        try:
            save_hf(
                folder,
                runtime.shape,
                stream,
                config.model_source,
                config.model_dtype,
                beside=beside,
                end_ids=runtime.ends.ids,
            )
        except (OSError, BadInput) as error:
            problem = getattr(error, "strerror", None) or plain(error)
            log.info("cause", exc_info=True)  # into the log file only
    for _ in stream:  # the other ranks send all of it, whatever becomes of it
        pass
    return runtime.move.from_controller(lambda: problem)
