"""Opening the run folder: it is taken, and what is there is moved aside or continued.

take       the controller makes the folders its own, before it changes anything in them
share      every rank looks whether it sees these folders, too
look       where the run goes on from, whether anything is left to do, what is in the way
start      an earlier run is moved aside, or the files are brought to the step of the checkpoint
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from r1zero.checkpoint import resume
from r1zero.checkpoint.progress import CheckpointInfo, TrainerState
from r1zero.config.load import dump
from r1zero.config.schema import Config
from r1zero.distributed.groups import World
from r1zero.distributed.shared import check_shared
from r1zero.distributed.shutdown import BAD_INPUT
from r1zero.distributed.transfer import RoleTransfer
from r1zero.errors import BadInput
from r1zero.preflight.outputs import MODEL, check_content, claimed, is_done, starts_anew
from r1zero.preflight.run import Run
from r1zero.run_folder.claim import Hold, take
from r1zero.run_folder.folder import continue_folder, start_folder


@dataclass(frozen=True, slots=True)
class Opening:
    """What every rank knows about the beginning."""

    checkpoint: Path | None  # to go on from
    said: list[str]  # to be told
    is_done: bool  # nothing is left to do
    folder: Path  # the run folder, and that of its checkpoints, by the paths to write by: Hold.way
    checkpoints: Path


def open_run(run: Run, world: World) -> tuple[Hold, Opening]:
    """Take the folders of a run and open them. Collective.

    The hold, which must be released, is empty but on the controller. BadInput when another run has
    them, something in them is in the way, or not all ranks see them.
    """
    move = RoleTransfer(world)
    if world.is_controller:
        hold = _take(run.config, world)
    else:
        hold = Hold()
    try:
        check_shared(world, move.from_controller(_proofs, hold))
        return hold, move.from_controller(_open, run, hold)
    except BaseException:
        hold.release()
        raise


def _take(cfg: Config, world: World) -> Hold:
    """Take the folders. The watch ends the job when they are lost, and frees them at any end."""

    def on_lost(error: BadInput) -> None:
        if world.watch is not None:
            world.watch.end_process(error, BAD_INPUT)

    hold = take(claimed(cfg), lambda line: print(line, flush=True), on_lost)
    if world.watch is not None:
        world.watch.before_exit = hold.release
    return hold


def _proofs(hold: Hold) -> dict[str, tuple[Path, Path, str]]:
    """What each rank must see of the folders that were taken."""
    return {claim.key: (claim.folder, claim.path, claim.path.read_text()) for claim in hold.claims}


def _open(run: Run, hold: Hold) -> Opening:
    """Start or continue the run folder, unless there is nothing to do."""
    cfg = run.config
    folder = run.output_dir
    checkpoint = resume.find(run.checkpoints, cfg.training.resume)
    said = [*(f"warning: {warning}" for warning in run.warnings), *hold.said]
    done = TrainerState()
    if checkpoint is not None:
        done = CheckpointInfo.read(checkpoint).progress
    training = cfg.training
    step = done.step
    progress = f"step {step} of {training.train_iters}"
    way_on = "raise training.train_iters to go on"
    if step < training.train_iters:
        progress += ", where training.stop_at is reached"
        way_on = "raise training.stop_at, or set it to null, to go on"
    if is_done(cfg, checkpoint):
        said.append(
            f"nothing left to do: {progress}, and its model is in {folder / MODEL}; {way_on}"
        )
        return Opening(checkpoint, said, True, hold.way(folder), hold.way(run.checkpoints))
    if problems := check_content(
        cfg, checkpoint, run.actor.folder
    ):  # once more, since now nobody else changes it
        raise BadInput("\n".join(problems))
    if starts_anew(cfg, checkpoint):
        said += start_folder(folder, dump(cfg))
    else:
        said += continue_folder(folder, dump(cfg), step)
    if done.is_trained(training.train_iters, training.stop_at):
        said.append(f"nothing left to train: {progress}; only the model is still to be written")
    run.checkpoints.parent.mkdir(parents=True, exist_ok=True)  # a save makes none around its own
    return Opening(checkpoint, said, False, hold.way(folder), hold.way(run.checkpoints))
