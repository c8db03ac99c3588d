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
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from r1zero.checkpoint.manifest import File, describe
from r1zero.errors import BadInput
from r1zero.run_folder.durable import sync, sync_folder
from r1zero.types import Batch, Group, Outcome, Part, Prompt, Sample, Score

FOLDER = "in_flight"
TEXT = "text"

T = TypeVar("T")


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


def size(groups: Sequence[Group]) -> int:
    """Bytes that groups take in a checkpoint, but for their text, which is little beside arrays."""
    result = 0
    for group in groups:
        holders: list[Group | Prompt | Sample] = [group, group.prompt, *group.samples]
        for holder in holders:
            values = [getattr(holder, field.name) for field in fields(holder)]
            result += sum(value.nbytes for value in values if isinstance(value, np.ndarray))
    return result


def read(folder: Path, positions: Container[int]) -> list[Group]:
    """The groups at these positions in a checkpoint, in order, whatever replica wrote them. Arrays
    of others stay on the disk: routes of all replicas can be more than a host holds.

    BadInput when a file is damaged.
    """

    def of(plain: dict[str, Any], arrays: Any) -> Group | None:
        if plain["position"] not in positions:
            return None
        return _group(**_filled(plain, arrays))

    groups = [group for group in _each(folder, of) if group is not None]
    return sorted(groups, key=lambda group: group.position)


def read_batch(folder: Path, plan: Mapping[str, Any]) -> Batch:
    """The batch of a plan, with the prompts of the groups in a checkpoint. BadInput when a file is
    damaged."""

    def of(plain: dict[str, Any], arrays: Any) -> tuple[int, Prompt]:
        return plain["position"], Prompt(**_filled(plain["prompt"], arrays))

    prompts = dict(_each(folder, of))
    return planned(plan, [prompts[position] for position in sorted(prompts)])


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


def planned(plan: Mapping[str, Any], prompts: list[Prompt]) -> Batch:
    """The batch of a plan, given the prompts of all its positions in order."""
    parts = []
    for first, end, shortest, beyond in plan["parts"]:
        parts.append(Part(range(first, end), range(shortest, beyond)))
    return Batch(
        step=plan["step"],
        version=plan["version"],
        prompts=prompts,
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


def _each(folder: Path, made: Callable[[dict[str, Any], Any], T]) -> list[T]:
    """What `made` makes of each group in a checkpoint, given its fields and the file's tensors."""
    found = []
    for path in sorted((folder / FOLDER).glob("replica_*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as arrays:
                for plain in json.loads(arrays.get_tensor(TEXT).tobytes()):
                    found.append(made(plain, arrays))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path} cannot be read ({error})") from None
    return found


# A tensor's slice reads that part of the file. safetensors gives what it opens no public type.
def _filled(value: Any, arrays: Any) -> Any:
    """Fields with arrays in their places."""
    if isinstance(value, list):
        return [_filled(entry, arrays) for entry in value]
    if not isinstance(value, dict):
        return value
    if value.keys() >= {"array", "start", "stop"}:
        flat = arrays.get_slice(value["array"])[value["start"] : value["stop"]]
        return flat.reshape(value.get("shape", flat.shape))
    return {key: _filled(entry, arrays) for key, entry in value.items()}


def _group(prompt: dict[str, Any], samples: list[dict[str, Any]], **fields: Any) -> Group:
    return Group(
        prompt=Prompt(**prompt), samples=[_sample(**sample) for sample in samples], **fields
    )


def _sample(scores: dict[str, dict[str, Any]], **fields: Any) -> Sample:
    return Sample(scores={name: _score(**score) for name, score in scores.items()}, **fields)


def _score(outcome: int, **fields: Any) -> Score:
    return Score(outcome=Outcome(outcome), **fields)
