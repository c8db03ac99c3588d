"""The checkpoint manager: when checkpoints are saved, and how a save, async or not, ends.

begin   the controller makes the folder; train and ref ranks copy their state  blocks the step
write   each of them writes, syncs and sums its files                          beside the next steps if async
finish  table of contents, list of files, rename, tracker, old ones deleted    at the end of a step
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from r1zero.checkpoint import in_flight, lengths, manifest, progress, store
from r1zero.checkpoint.progress import CheckpointInfo
from r1zero.checkpoint.reference_state import ReferenceWriting, files_of
from r1zero.checkpoint.state import RunState
from r1zero.checkpoint.train_state import Writing, rng_states
from r1zero.checkpoint.writing import FileWriting
from r1zero.distributed.collectives import all_max, all_sum
from r1zero.distributed.shutdown import PreemptionNotice
from r1zero.models.lora import trained_parameters
from r1zero.models.sizes import OPTIMIZER_BYTES
from r1zero.policy.actor import Actor
from r1zero.policy.reference import Reference
from r1zero.run_folder.durable import sync
from r1zero.run_folder.owner import plain
from r1zero.types import Group

# room for what is written last, so that a disk that fills up meanwhile still takes it
RESERVE = ".reserve"
RESERVE_BYTES = 4 << 20
RNG = "rng.safetensors"
FIRST_SAVE_SPEED = 2e8  # bytes a second, until a save was measured
MARGIN_SECONDS = 10.0

log = logging.getLogger("r1zero")


@dataclass(frozen=True, slots=True)
class _Written:
    """What a rank wrote."""

    files: dict[str, manifest.File]
    error: str | None


NOTHING = _Written({}, None)


@dataclass(slots=True)
class _Save:
    """The save under way."""

    folder: Path  # that it is written into
    info: CheckpointInfo | None = None  # on train ranks
    policy: Writing | None = None  # on train ranks
    reference: ReferenceWriting | None = None  # on ref ranks that write it, once it was reset
    rng: dict[str, torch.Tensor] | None = None  # on the controller
    lengths: dict[str, np.ndarray] | None = None  # on the controller
    groups: _Written = NOTHING  # what is drawn and not yet learnt from, on ranks that hold it

    @property
    def writings(self) -> list[FileWriting]:
        """What this rank writes, at once or beside the next steps."""
        return [part for part in (self.policy, self.reference) if part is not None]

    @property
    def reserve(self) -> Path:
        return self.folder / RESERVE


def _first_error(reports: Sequence[_Written]) -> str | None:
    return next((report.error for report in reports if report.error), None)


class CheckpointManager:
    """Saves the runtime's state when it is due."""

    def __init__(self, runtime: RunState, notice: PreemptionNotice) -> None:
        self.runtime = runtime
        self.notice = notice
        self.config = runtime.checkpoint_config
        # the last step whose state is on disk, or on its way there
        self._saved = runtime.progress.step
        self._save: _Save | None = None  # under way
        self._began = self._looked = time.monotonic()
        self._held = 0.0  # seconds that the save under way kept the step waiting
        self._longest_step = 0.0
        self._longest_save: float | None = None

    def after_step(self) -> str | None:
        """Save if it is due, and say why the run should end early, if it should. Collective."""
        runtime = self.runtime
        config = self.config
        self._longest_step = max(self._longest_step, time.monotonic() - self._looked)
        wish = self._wish()
        somebody_leaves, somebody_writes = self._any_rank(wish is not None, not self._is_written)
        if not somebody_writes:
            self.finish()
        step = runtime.progress.step
        last = config.is_trained(runtime.progress)
        reason = None
        if somebody_leaves and not last:
            reason = next(filter(None, runtime.move.all_gather(wish)))
        if reason or (config.save_interval and (last or step % config.save_interval == 0)):
            self.save()
        if reason or last:
            self.finish()
        if reason and self._saved != step:
            raise RuntimeError(f"{reason}, and the state of step {step} could not be saved")
        self._looked = time.monotonic()
        return reason

    def save(self) -> None:
        """Save the state after the current step, unless that is done already. Collective."""
        self.finish()
        runtime = self.runtime
        step = self.runtime.progress.step
        if step == self._saved:
            return
        self._began = time.monotonic()
        groups = runtime.groups_in_flight()
        drawn = torch.tensor(in_flight.size(groups))
        all_sum(drawn, runtime.world.control)
        room = runtime.move.from_controller(self._make_room, int(drawn))
        if isinstance(room, str):
            self._fail(step, room)
            return
        save = self._save = _Save(room)
        policy = runtime.policy
        if isinstance(policy, Actor):
            save.info = self._info(policy)
            save.rng = rng_states(policy)
            if runtime.planner is not None:
                save.lengths = runtime.planner.state()
            self._show_folder()
            save.policy = Writing(policy, save.folder, step)
        if (reference := self._reference_to_write()) is not None:
            self._show_folder()
            save.reference = ReferenceWriting(reference, save.folder)
        for writing in save.writings:
            if self.config.async_save:
                writing.start()
            else:
                writing.run()
        if groups:
            save.groups = self._write_groups(save.folder, groups)
        self._saved = step
        self._held = time.monotonic() - self._began
        if not self.config.async_save:
            self.finish()

    def finish(self) -> None:
        """Bring the save under way to its end, if there is one. Collective."""
        if self._save is None:
            return
        save = self._save
        self._save = None
        runtime = self.runtime
        waited = time.monotonic()
        written = save.groups
        for writing in save.writings:
            writing.join()
            written = _Written(writing.files | written.files, writing.error or written.error)
        reports = runtime.move.to_controller(written)
        problem = runtime.move.from_controller(_first_error, reports)
        if problem is None:
            runtime.move.at_controller(save.reserve.unlink)
            if save.policy is not None:
                save.policy.finalize()
            problem = runtime.move.from_controller(self._seal, save, reports)
        self._longest_save = max(self._longest_save or 0.0, time.monotonic() - self._began)
        if problem is not None:
            runtime.move.at_controller(shutil.rmtree, save.folder, True)
            self._fail(self._saved, problem)
        elif runtime.world.is_controller:
            held = self._held + (time.monotonic() - waited if self.config.async_save else 0.0)
            log.info(
                "checkpoint %s saved in %.1f s, of which training waited %.1f s",
                store.folder_of(self.config.folder, self._saved),
                time.monotonic() - self._began,
                held,
            )

    def _reference_to_write(self) -> Reference | None:
        """The reference, on ranks that write a part of it; None before it was ever reset: its start
        weights are where they were."""
        reference = self.runtime.reference
        was_reset = self.runtime.progress.reference_version > 0
        if isinstance(reference, Reference) and was_reset and files_of(reference.model.grid):
            return reference
        return None

    def _show_folder(self) -> None:
        """Let a network disk show what is there: NFS may not yet, until it is asked."""
        for folder in (self.runtime.checkpoints.parent, self.runtime.checkpoints):
            os.listdir(folder)

    def _write_groups(self, folder: Path, groups: list[Group]) -> _Written:
        """Write what this rank's rollout replica drew ahead."""
        try:
            replica = self.runtime.world.rollout.replica
            return _Written(in_flight.write(folder, replica, groups), None)
        except OSError as error:
            return _Written({}, str(error))

    def keep(self) -> Path | None:
        """The checkpoint of the current step, saved if need be; None when that fails.
        Collective."""
        if self.runtime.move.from_controller(self._current) is None:
            self._saved = -1  # what the run went on from may lie elsewhere
        try:
            self.save()
            self.finish()
        except RuntimeError as error:  # on_save_failure: stop
            log.warning("%s", error)
        return self.runtime.move.from_controller(self._current)

    @property
    def _is_written(self) -> bool:
        """Nothing is being written on this rank."""
        return self._save is None or all(writing.done for writing in self._save.writings)

    def _any_rank(self, *mine: bool) -> list[bool]:
        """Whether any rank says yes, question by question. Collective."""
        answers = torch.tensor(mine, dtype=torch.int32)
        all_max(answers, self.runtime.world.control)
        return [bool(answer) for answer in answers]

    # -- why to leave ---------------------------------------------------------------------------

    def _wish(self) -> str | None:
        """Why this rank wants to leave. The controller's clock alone decides about time."""
        if self.notice.asked_by:
            return f"{self.notice.asked_by} asks to leave"
        if not self.runtime.world.is_controller:
            return None
        left = self.notice.seconds_left()
        save = self._longest_save or self._bytes / FIRST_SAVE_SPEED
        needed = self._longest_step + save + MARGIN_SECONDS
        if left < needed:
            return f"{left:.0f} s are left, and another step and save need {needed:.0f} s"
        return None

    # -- on the controller ----------------------------------------------------------------------

    def _current(self) -> Path | None:
        """The complete checkpoint of the current step, if there is one."""
        step = self.runtime.progress.step
        folder = store.folder_of(self.config.folder, step)
        if self._saved == step and (folder / manifest.NAME).is_file():
            return folder
        return None

    @property
    def _bytes(self) -> int:
        """About the size of a checkpoint, but for groups on their way."""
        policy = self.runtime.policy
        assert isinstance(policy, Actor), "the controller trains"
        of_parameter = policy.model.dtype.itemsize + OPTIMIZER_BYTES
        elements = trained_parameters(self.runtime.shape, self.config.lora)
        size = elements * of_parameter + RESERVE_BYTES
        if self.runtime.progress.reference_version:
            size += self.runtime.shape.num_parameters * policy.model.dtype.itemsize
        return size

    def _make_room(self, drawn: int) -> Path | str:
        """Make the folder to write into, given the bytes of all groups on their way; returns it, or
        what stands against it."""
        self.runtime.hold.check()
        needed = self._bytes + drawn
        try:
            folder = store.start(self.runtime.checkpoints, self.runtime.progress.step)
            free = shutil.disk_usage(folder).free
            if free < needed:
                shutil.rmtree(folder)
                return (
                    f"it needs {needed / 1e9:.3g} GB, and {self.config.folder} has "
                    f"{free / 1e9:.3g} GB free"
                )
            (folder / RESERVE).write_bytes(bytes(RESERVE_BYTES))
        except OSError as error:
            return str(error)
        return folder

    def _seal(self, save: _Save, reports: Sequence[_Written]) -> str | None:
        """Complete the checkpoint and give it its name; returns what stands against it."""
        files = {}
        for report in reports:
            for name, file in report.files.items():
                files[name] = file
        self.runtime.hold.check()
        config = self.config
        assert save.info is not None and save.rng is not None, "the controller trains"
        assert save.lengths is not None, "the controller trains"
        step = save.info.progress.step
        try:
            (save.folder / RNG).write_bytes(save_tensors(save.rng))
            lengths.write(save.folder, save.lengths)
            (save.folder / "config.yaml").write_text(config.config_text)
            (save.folder / progress.NAME).write_text(save.info.text())
            for path in sorted(save.folder.iterdir()):
                if path.is_file() and path.name not in files:  # folders are their writers' to list
                    files[path.name] = manifest.describe(path)
                    sync(path)
            manifest.write(save.folder, files)
            store.publish(save.folder, step)
        except OSError as error:
            return str(error)
        try:
            for old in store.prune(self.runtime.checkpoints, step, config.retention):
                log.info("checkpoint %s deleted (keep_last, keep_every, keep_best)", plain(old))
        except OSError as error:  # the new one is safe all the same
            log.warning("an old checkpoint could not be deleted: %s", plain(error))
        return None

    def _info(self, policy: Actor) -> CheckpointInfo:
        runtime = self.runtime
        return CheckpointInfo(
            replace(runtime.progress),
            policy.scheduler.num_steps,
            policy.kl.kept,
            asdict(runtime.shape),
            str(policy.model.dtype).removeprefix("torch."),
            progress.layout_of(policy.grid.span),
            dict(self.config.start),
            entropy_coefficient=policy.entropy.kept,
            entropy_applies=policy.entropy.applies,
            versions={name: version(name) for name in ("torch", "megatron-core", "transformers")},
            lora=None if self.config.lora is None else asdict(self.config.lora),
            in_flight=next(map(in_flight.plan_of, runtime.batches.values()), None),
        )

    def _fail(self, step: int, problem: str) -> None:
        """Say that nothing was saved; RuntimeError on all ranks if on_save_failure is to stop.

        BadInput if the folder was taken away. Collective.
        """
        self.runtime.move.from_controller(self.runtime.hold.check)
        kept = store.complete(self.config.folder)
        said = (
            f"the checkpoint of step {step} could not be saved: {plain(problem)}; "
            f"{f'the last good one is {kept[-1]}' if kept else 'there is none yet'}"
        )
        self._saved = -1
        if self.config.stop_on_failure:
            raise RuntimeError(said)
        if self.runtime.world.is_controller:
            log.warning("%s; training goes on (training.on_save_failure: go_on)", said)
