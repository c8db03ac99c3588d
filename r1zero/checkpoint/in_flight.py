"""Groups on their way: generated, and not yet learnt from when a checkpoint is saved.

    in_flight/replica_0003.safetensors    what rollout replica 3 holds of them

Arrays of one type lie end to end in one tensor of that type. The tensor "text", UTF-8, is JSON: the
groups with all their fields, and in place of an array where it lies, with its shape if it has
several axes:

    {"position": 3, "prompt": {"index": 17, "tokens": {"array": "int32", "start": 0, "stop": 9}, ...}, ...}

So any layout reads what any other wrote. The data row of a prompt stays behind: reward functions,
which alone see it, have spoken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from r1zero.checkpoint.manifest import File, describe
from r1zero.errors import BadInput
from r1zero.run_folder.durable import sync, sync_folder
from r1zero.types import Batch, Group, Outcome, Part, Prompt, Sample, Score

FOLDER = "in_flight"
TEXT = "text"


def write(folder: Path, replica: int, groups: Sequence[Group]) -> dict[str, File]:
    """Write and sync a rollout replica's groups into the checkpoint `folder`.

    Returns the file's size and sum by its name in the checkpoint, for the manifest. OSError when it
    cannot be written.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    name = f"{FOLDER}/replica_{replica:04d}.safetensors"
    try:
        save_file(_packed(groups), folder / name)
    except SafetensorError as error:  # which covers what the system said
        raise OSError(str(error)) from error
    sync(folder / name)
    sync_folder(folder / FOLDER)
    return {name: describe(folder / name)}


def read(folder: Path) -> list[Group]:
    """The groups of all replicas in a checkpoint, in order of position; none when it has none.

    BadInput when a file is damaged.
    """
    groups: list[Group] = []
    for path in sorted((folder / FOLDER).glob("replica_*.safetensors")):
        try:
            groups += _unpacked(load_file(path))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path} cannot be read ({error})") from None
    return sorted(groups, key=lambda group: group.position)


def plan_of(batch: Batch) -> dict[str, Any]:
    """All of a batch but its prompts, which its groups have, as JSON."""
    parts = []
    for part in batch.parts:
        positions = part.positions
        lengths = part.lengths
        parts.append([positions.start, positions.stop, lengths.start, lengths.stop])
    return {
        "step": batch.step,
        "version": batch.version,
        "samples_per_prompt": batch.samples_per_prompt,
        "minibatch_size": batch.minibatch_size,
        "epochs": batch.epochs,
        "accumulates": batch.accumulates,
        "staleness": batch.staleness,
        "reference_version": batch.reference_version,
        "response_limit": batch.response_limit,
        "first_draws": batch.first_draws,
        "pool": batch.pool,
        "keeps_routes": batch.keeps_routes,
        "parts": parts,
    }


def planned(plan: Mapping[str, Any], groups: Sequence[Group]) -> Batch:
    """The batch of a plan, given the groups of all its positions in order."""
    parts = []
    for first, end, shortest, beyond in plan["parts"]:
        parts.append(Part(range(first, end), range(shortest, beyond)))
    return Batch(
        step=plan["step"],
        version=plan["version"],
        prompts=[group.prompt for group in groups],
        samples_per_prompt=plan["samples_per_prompt"],
        minibatch_size=plan["minibatch_size"],
        epochs=plan["epochs"],
        accumulates=plan["accumulates"],
        planned_parts=tuple(parts),
        staleness=plan["staleness"],
        reference_version=plan.get("reference_version", 0),  # older plans have none
        # older plans have none of these
        response_limit=plan.get("response_limit"),
        first_draws=tuple((step, position) for step, position in plan.get("first_draws", ())),
        pool=plan.get("pool"),
        keeps_routes=plan.get("keeps_routes", False),
    )


class _Pool:
    """Arrays of each type, laid end to end."""

    def __init__(self) -> None:
        self._parts: dict[str, list[np.ndarray]] = {}
        self._sizes: dict[str, int] = {}

    def add(self, array: np.ndarray) -> dict[str, Any]:
        """Lay an array behind the others of its type; returns where it lies."""
        assert isinstance(array, np.ndarray), f"no field of a group: {array!r}"
        kind = str(array.dtype)
        start = self._sizes.get(kind, 0)
        stop = start + array.size
        self._parts.setdefault(kind, []).append(array.reshape(-1))
        self._sizes[kind] = stop
        place: dict[str, Any] = {"array": kind, "start": start, "stop": stop}
        if array.ndim != 1:
            place["shape"] = array.shape
        return place

    def tensors(self) -> dict[str, np.ndarray]:
        """One array of each type."""
        return {kind: np.concatenate(parts) for kind, parts in self._parts.items()}


def _packed(groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """Groups as a few flat tensors."""
    pool = _Pool()
    plain = []
    for group in groups:
        without_row = replace(group, prompt=replace(group.prompt, row=None))
        plain.append(asdict(without_row))
    text = json.dumps(plain, default=pool.add)
    return pool.tensors() | {TEXT: np.frombuffer(text.encode(), dtype=np.uint8)}


def _unpacked(tensors: dict[str, np.ndarray]) -> list[Group]:
    """The groups that were packed into these tensors."""

    def with_array(entry: dict[str, Any]) -> Any:
        if not entry.keys() >= {"array", "start", "stop"}:
            return entry
        flat = tensors[entry["array"]][entry["start"] : entry["stop"]].copy()
        return flat.reshape(entry.get("shape", flat.shape))

    plain = json.loads(tensors[TEXT].tobytes(), object_hook=with_array)
    return [_group(**fields) for fields in plain]


def _group(prompt: dict[str, Any], samples: list[dict[str, Any]], **fields: Any) -> Group:
    return Group(
        prompt=Prompt(**prompt), samples=[_sample(**sample) for sample in samples], **fields
    )


def _sample(scores: dict[str, dict[str, Any]], **fields: Any) -> Sample:
    return Sample(scores={name: _score(**score) for name, score in scores.items()}, **fields)


def _score(outcome: int, **fields: Any) -> Score:
    return Score(outcome=Outcome(outcome), **fields)
