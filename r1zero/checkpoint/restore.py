"""Resume from a checkpoint: every rank loads its part, and one line says what that was."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from r1zero.checkpoint import in_flight, lengths, manifest, store
from r1zero.checkpoint.progress import CheckpointInfo, layout_of
from r1zero.checkpoint.reference_state import StoredReference
from r1zero.checkpoint.resume import changes
from r1zero.checkpoint.state import RunState
from r1zero.checkpoint.train_state import load_policy, set_rng_states
from r1zero.distributed.groups import World
from r1zero.distributed.transfer import RoleTransfer
from r1zero.errors import BadInput
from r1zero.policy.actor import Actor
from r1zero.policy.reference import Reference

log = logging.getLogger("r1zero")


def verify(world: World, folder: Path) -> None:
    """Compare every file with its sum, the ranks sharing the work. Collective. BadInput on all if
    one differs."""
    names = sorted(manifest.read(folder))
    problem = None
    try:
        manifest.check_sums(folder, names[world.rank :: world.size])
    except BadInput as error:
        problem = str(error)
    problem = next(filter(None, RoleTransfer(world).all_gather(problem)), None)
    if problem is not None:
        raise BadInput(f"{problem}{store.way_out(folder)}")


def restore(runtime: RunState, folder: Path) -> None:
    """Bring the runtime where the checkpoint was saved. Collective over the world. BadInput when it
    does not fit."""
    record = CheckpointInfo.read(folder)
    runtime.progress = record.progress
    layout = layout_of(runtime.world.train.span)
    same_layout = layout == record.layout
    policy = runtime.policy
    if isinstance(policy, Actor):
        load_policy(policy, folder, record.updates)
        policy.kl.restore(record.kl_coefficient)
        policy.entropy.restore(record.entropy_coefficient, record.entropy_applies)
        if same_layout:
            set_rng_states(policy, load_file(folder / "rng.safetensors"))
    _restore_reference(runtime, folder)
    if record.in_flight is not None:
        _restore_groups(runtime, folder, record.in_flight)
    runtime.move.flush(0)
    if runtime.planner is not None:
        if known := lengths.read(folder):
            runtime.planner.restore(known)
        log.info(_line(runtime, folder, record, layout))
        for change in changes(runtime.checkpoint_config.config_text, folder):
            log.info("changed since then: %s", change)


def _restore_reference(runtime: RunState, folder: Path) -> None:
    """Take back a reference that was reset. A run without one leaves it behind, for good."""
    if runtime.world.ref is None:
        runtime.progress.reference_version = 0
    reference = runtime.reference
    if isinstance(reference, Reference) and runtime.progress.reference_version:
        reference.model.fill(StoredReference(folder, runtime.shape))


def _restore_groups(runtime: RunState, folder: Path, plan: Mapping[str, Any]) -> None:
    """Take back what was drawn ahead: every rank the batch, a rollout replica its groups."""
    rollout = runtime.world.rollout
    batch = runtime.move.share_batch(runtime.move.at_controller(in_flight.read_batch, folder, plan))
    # what the reference said is asked for anew: there may be one now, or none
    version = runtime.progress.reference_version if runtime.has_reference else None
    batch = replace(batch, reference_version=version)
    mine = []
    if rollout.is_output_rank:
        mine = in_flight.read(folder, rollout.share(len(batch.prompts)))
    runtime.restored.append((batch, mine))


def _line(runtime: RunState, folder: Path, record: CheckpointInfo, layout: dict[str, int]) -> str:
    """Say what was restored."""

    def shown(grid: dict[str, int]) -> str:
        return " ".join(f"{axis.upper()}{size}" for axis, size in grid.items())

    policy = runtime.policy
    assert isinstance(policy, Actor), "the controller trains"
    done = record.progress
    config = runtime.checkpoint_config
    if layout == record.layout:
        where = shown(layout)
        rng = "random states"
    else:
        where = f"saved at {shown(record.layout)}, now {shown(layout)}"
        rng = "random states begun anew (they belong to a layout)"
    return (
        f"resumed from {folder}: step {done.step} of {config.total_steps}; model "
        f"and optimizer ({where}), learning-rate schedule at update {record.updates}, KL "
        f"coefficient {policy.kl.value:g} ({config.kl_control}), {rng}, data at prompt "
        f"{done.prompts_drawn}, weights version {done.weights_version}; "
        f"{_reference_line(runtime, record)}"
    )


def _reference_line(runtime: RunState, record: CheckpointInfo) -> str:
    """Say what the reference is."""
    if runtime.world.ref is None:
        if runtime.checkpoint_config.lora is not None:
            return "the reference of a KL term is the model below the adapters"
        return "there is no reference"
    if version := record.progress.reference_version:
        return f"the reference is the policy after step {version}"
    return f"the reference is {runtime.checkpoint_config.start['ref']}"
