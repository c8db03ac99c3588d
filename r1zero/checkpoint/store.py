"""The folder of checkpoints: their names, the tracker file, which one counts, pruning.

    iter_0000010/                        a complete checkpoint: Megatron's torch_dist files, and
        trainer.json                     where the run was (checkpoint/progress.py)
        reference/                       the reference, once it was reset (checkpoint/reference_state.py)
        rng.safetensors                  random states of the train ranks
        expected_lengths.safetensors     how long answers were (data/batches.py)
        config.yaml                      the resolved configuration
        complete.json                    the list of all files, written last (checkpoint/manifest.py)
    .iter_0000020.x1y2.partial/          one being written, or left by a save that did not end
    latest_checkpointed_iteration.txt    the iteration that a restart goes on from; write another one to go back

A checkpoint is written under its hidden name and renamed when all of it is on disk, and only then
named by the tracker. So whenever a run is killed, the tracker names a complete checkpoint. The
tracker rules: a later checkpoint that it does not name belongs to a future that was given up.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from r1zero.checkpoint import manifest, progress
from r1zero.checkpoint.retention import Retention, Scores
from r1zero.errors import BadInput
from r1zero.run_folder.durable import replace_synced, sync_folder
from r1zero.weights.detect import TRACKER, is_megatron

_NAME = re.compile(r"iter_(\d{7,})")


def folder_of(save: Path, iteration: int) -> Path:
    return save / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """The iteration that a folder's name tells; None for other folders."""
    match = _NAME.fullmatch(folder.name)
    if match:
        return int(match[1])
    return None


def complete(save: Path) -> list[Path]:
    """All checkpoints of this program that were saved to their end, oldest first."""
    found = {
        iteration_of(path.parent): path.parent for path in save.glob(f"iter_*/{manifest.NAME}")
    }
    return [
        found[iteration] for iteration in sorted(number for number in found if number is not None)
    ]


def find(save: Path) -> Path | None:
    """The checkpoint that a run saving into `save` goes on from: the one that the tracker names,
    else the newest.

    None when there is none yet, or when the tracker names one that other programs wrote. BadInput
    when it names nothing, or one that is gone or was never finished: the run would begin anew,
    unasked.
    """
    tracker = save / TRACKER
    if not tracker.is_file():
        if complete(save):
            return complete(save)[-1]
        return None
    word = tracker.read_text(errors="replace").strip()
    if word == "release":
        return None
    if not word.isdecimal():
        raise BadInput(
            f"{tracker} says {word[:40]!r} instead of an iteration's number{way_out(tracker)}"
        )
    folder = folder_of(save, int(word))
    if (folder / manifest.NAME).is_file():
        return folder
    if not folder.is_dir():
        raise BadInput(
            f"{tracker} names iteration {word}, but there is no {folder}{way_out(folder)}"
        )
    if is_megatron(folder) and not (folder / progress.NAME).exists():
        return None
    raise BadInput(
        f"{folder} has no {manifest.NAME}: it was never saved to its end, or lost files"
        f"{way_out(folder)}"
    )


def way_out(damaged: Path) -> str:
    """Name the checkpoint before a damaged one, of a damaged tracker the newest, and how to go on
    from it."""
    save = damaged.parent
    iteration = iteration_of(damaged)
    before = [path for path in complete(save) if iteration is None or _number(path) < iteration]
    if iteration is None:
        which = "complete checkpoint"
    else:
        which = "complete checkpoint before it"
    if not before:
        return f"; there is no {which}: name another output_dir to start anew"
    return (
        f"; the {'newest ' if iteration is None else ''}{which} is {before[-1]}: "
        f"write {iteration_of(before[-1])} into {save / TRACKER} to go on from there"
    )


def start(save: Path, iteration: int) -> Path:
    """Make the empty folder that a checkpoint is written into, and clear away what earlier saves
    left unfinished.

    Its name is new each time: ranks of a run that was killed may still write into theirs.
    The folder around `save` must be there. OSError when it cannot be made.
    """
    save.mkdir(exist_ok=True)
    for leftover in save.glob(".iter_*"):
        shutil.rmtree(leftover, ignore_errors=True)  # what stays must not stand against saving
    partial = save / f".iter_{iteration:07d}.{os.urandom(4).hex()}.partial"
    partial.mkdir()
    return partial


def publish(partial: Path, iteration: int) -> Path:
    """Give a written and completed checkpoint its name, and let the tracker name it. OSError when
    that fails.

    One of this name, of a future that was given up or saved twice, is deleted only when the new one
    is in its place: to delete takes long, and a kill meanwhile would leave the tracker with nothing.
    """
    save = partial.parent
    folder = folder_of(save, iteration)
    replaced = None
    if folder.exists():
        if not (folder / manifest.NAME).is_file():
            raise FileExistsError(f"{folder} is there already and was not written by this program")
        replaced = _hide(folder)
    partial.rename(folder)
    sync_folder(save)
    replace_synced(save / TRACKER, f"{iteration}\n")
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return folder


def prune(save: Path, newest: int, retention: Retention) -> list[Path]:
    """Delete the checkpoints up to `newest` that need not be kept.

    Only those that this program completed; returns them.
    """
    found = {_number(path): path for path in complete(save) if _number(path) <= newest}
    scores = {step: _scores(path) for step, path in found.items()}
    spare = [found[step] for step in retention.spare(scores)]
    for path in spare:
        discard(path)
    return spare


def best(save: Path, retention: Retention) -> tuple[Path, float] | None:
    """The checkpoint with the best score, and that; None when none has it."""
    scores = {_number(path): _scores(path) or {} for path in complete(save)}
    steps = retention.best(scores)
    if not steps:
        return None
    return folder_of(save, steps[0]), scores[steps[0]][retention.best_score]


def _scores(folder: Path) -> Scores | None:
    """The scores of a checkpoint; None when it was not evaluated, or does not tell."""
    try:
        return progress.CheckpointInfo.read(folder).progress.scores
    except BadInput:
        return None


def _number(folder: Path) -> int:
    """The iteration of a checkpoint that is complete."""
    iteration = iteration_of(folder)
    assert iteration is not None, "complete checkpoints have numbers"
    return iteration


def discard(folder: Path) -> None:
    """Delete a checkpoint; hidden first, so that no half of one passes for a whole. OSError when
    that fails.

    What a file system keeps of it, because somebody has it open, is deleted by a later save.
    """
    shutil.rmtree(_hide(folder), ignore_errors=True)


def _hide(folder: Path) -> Path:
    """Give a checkpoint the hidden name under which it is deleted."""
    hidden = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    return hidden
