"""Export of the trained model as a Hugging Face folder, which is what the user waits for.

Its files are dealt to train ranks, which gather and write them side by side. If it cannot be
written, the weights still go somewhere, and one sentence says where.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from r1zero.checkpoint.manager import CheckpointManager
from r1zero.checkpoint.state import RunState
from r1zero.distributed.transfer import RoleTransfer
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.lora import LoraConfig, adapter_params
from r1zero.models.params import ParamSpec
from r1zero.run_folder.exported import ADAPTER, MARK, MODEL, export_path, exports, in_the_way, mark
from r1zero.run_folder.owner import plain
from r1zero.weight_sync.gather import Assignment, assignments, gather_tensors, writers_of
from r1zero.weights.save_huggingface import (
    SHARD_BYTES,
    ModelFile,
    begin,
    complete,
    give_up,
    plan_files,
    way_to,
    write,
)
from r1zero.weights.save_peft import save_peft

log = logging.getLogger("r1zero")


def export(runtime: RunState, manager: CheckpointManager) -> None:
    """Write the trained model into the run folder. Collective.

    RuntimeError when that fails: it names the checkpoint or the other folder with the weights.
    """
    folder = runtime.checkpoint_config.model
    problem = (
        runtime.move.from_controller(_obstacle, runtime)
        or _write_adapter(runtime)
        or _write(runtime, runtime.folder / MODEL)
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
        if _write(runtime, refuge, alone=True) is None:
            raise RuntimeError(f"{told}; it is in {refuge} now: move it to a safe place")
    raise RuntimeError(f"{told}, nor anything to {', '.join(map(str, refuges))}")


def export_on_the_way(runtime: RunState) -> None:
    """Write the model of this step beside those before it, if it is due: not at the end, when it
    goes elsewhere. Collective.

    RuntimeError if that fails and training is to end when a save fails.
    """
    config = runtime.checkpoint_config
    step = runtime.progress.step
    is_due = config.export_interval and step % config.export_interval == 0
    if not is_due or config.is_trained(runtime.progress):
        return
    began = time.monotonic()
    problem = runtime.move.from_controller(_room_on_the_way, runtime)
    problem = problem or _write(runtime, export_path(runtime.folder, step))
    if problem is None:
        runtime.move.at_controller(_keep_on_the_way, runtime, time.monotonic() - began)
        return
    told = f"the model of step {step} could not be written: {problem}"
    if config.stop_on_failure:
        raise RuntimeError(told)
    if runtime.world.is_controller:
        log.warning("%s; training goes on (training.on_save_failure: go_on)", told)


def _room_on_the_way(runtime: RunState) -> str | None:
    """Make the folder of the models on the way; returns what stands against it."""
    runtime.hold.check()
    try:
        export_path(runtime.folder, 0).parent.mkdir(exist_ok=True)
    except OSError as error:
        return _told(error)
    return None


def _keep_on_the_way(runtime: RunState, seconds: float) -> None:
    """Tell of the model that was written, and delete those that need not be kept."""
    config = runtime.checkpoint_config
    step = runtime.progress.step
    log.info("model %s written in %.1f s", export_path(config.model.parent, step), seconds)
    until_now = {at: scores for at, scores in exports(runtime.folder).items() if at <= step}
    for old in config.retention.spare(until_now):
        shutil.rmtree(export_path(runtime.folder, old), ignore_errors=True)
        log.info("model %s deleted (keep_last, keep_every, keep_best)", export_path(Path(), old))


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


def _write(runtime: RunState, folder: Path, alone: bool = False) -> str | None:
    """Write the model to `folder`; returns what stood against it. Collective."""
    config = runtime.checkpoint_config
    target = ModelFolder(
        folder,
        config.model_source,
        config.model_dtype,
        beside={MARK: mark(runtime.progress.step, runtime.progress.scores)},
        end_ids=tuple(runtime.ends.ids),
    )
    return write_model(runtime.move, runtime.shape, runtime.policy.parameters(), target, alone)


def _write_adapter(runtime: RunState) -> str | None:
    """Write the adapters, if there are any, before the model: a run with a model is done.

    Returns what stood against it. Collective.
    """
    lora = runtime.checkpoint_config.lora
    if lora is None:
        return None
    world = runtime.world
    shape = runtime.shape
    plan = [Assignment(spec, 0, 0) for spec in adapter_params(shape, lora)]
    parameters = runtime.policy.adapter_parameters()
    stream = list(gather_tensors(world, shape, parameters, plan))
    return runtime.move.from_controller(_save_adapter, runtime, lora, stream)


def _save_adapter(
    runtime: RunState, lora: LoraConfig, stream: list[tuple[ParamSpec, torch.Tensor]]
) -> str | None:
    """Write the PEFT folder; returns what stands against it."""
    base = os.path.abspath(runtime.checkpoint_config.model_source)
    beside = {MARK: mark(runtime.progress.step)}
    try:
        save_peft(runtime.folder / ADAPTER, runtime.shape, lora, stream, base, beside)
    except (OSError, BadInput) as error:
        return _told(error)
    return None


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A Hugging Face folder that is to be written: see save_hf."""

    folder: Path
    source: Path
    dtype_name: str
    beside: Mapping[str, str] = field(default_factory=dict)
    end_ids: tuple[int, ...] = ()
    shard_bytes: int = SHARD_BYTES


def write_model(
    move: RoleTransfer,
    shape: ModelConfig,
    parameters: Mapping[str, torch.Tensor],
    target: ModelFolder,
    alone: bool = False,
) -> str | None:
    """Write the model that the train ranks hold; returns what stood against it. Collective.

    Its files are dealt to train ranks. With `alone` the controller writes all of them: other nodes
    need not see the folder.
    """
    world = move.world
    span = world.train.span
    files = plan_files(shape, target.dtype_name, target.shard_bytes)
    tensors = [file.tensors for file in files]
    if alone:
        writers = [0] * len(files)
    else:
        writers = writers_of(tensors, shape.num_layers, span)
    partial = move.from_controller(_begun, target)
    if isinstance(partial, str):
        return partial
    stream = gather_tensors(world, shape, parameters, assignments(tensors, writers, span))
    problem = None
    mine = [file for file, writer in zip(files, writers, strict=True) if writer == world.rank]
    if mine:
        try:
            os.listdir(partial.parent)  # NFS may not show yet what is there: this lets it ask
            write(partial, mine, stream)
        except OSError as error:
            problem = _told(error)
    for _ in stream:  # all go through all of it, whatever becomes of it
        pass
    problems = move.to_controller(problem)
    return move.from_controller(_completed, target, files, problems)


def _begun(target: ModelFolder) -> Path | str:
    """Make the folder to write into; returns it, or what stands against it."""
    try:
        return begin(way_to(target.folder), target.source)
    except (OSError, BadInput) as error:
        return _told(error)


def _completed(
    target: ModelFolder, files: list[ModelFile], problems: list[str | None]
) -> str | None:
    """Give the model its place when all files are written; returns what stands against it."""
    folder = way_to(target.folder)
    problem = next(filter(None, problems), None)
    if problem is None:
        try:
            complete(folder, files, target.source, target.dtype_name, target.beside, target.end_ids)
        except OSError as error:
            problem = _told(error)
    give_up(folder)
    return problem


def _told(error: OSError | BadInput) -> str:
    """An error in words; where it came from goes into the log file only."""
    log.info("cause", exc_info=error)
    return getattr(error, "strerror", None) or plain(error)
