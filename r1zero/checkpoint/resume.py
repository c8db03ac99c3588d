"""Which checkpoint a run goes on from, and whether it can. Reads only; needs neither torch nor a
world."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from r1zero.checkpoint import manifest, store
from r1zero.checkpoint.progress import CheckpointInfo
from r1zero.config.parse import parse_dumped
from r1zero.config.schema import CHECKPOINTS
from r1zero.errors import BadInput, shown
from r1zero.models.config import ModelConfig
from r1zero.models.lora import LoraConfig
from r1zero.weights import detect
from r1zero.weights.unpickle import check_pickles

# Keys that say where a run is kept, and not what it does.
PLACES = ("name", "output_dir", "training.resume", "actor_rollout_ref.actor_rollout.save")

# Fields of a model's shape as checkpoints of version 0.1 call them.
FORMER_NAMES = {"ffn_size": "ffn_hidden_size", "tied": "tie_word_embeddings"}


def locate(path: str | Path) -> Path | None:
    """The checkpoint of this program that a path names, directly or as the folder of checkpoints;
    None if none.

    BadInput when a tracker names one that is gone.
    """
    path = Path(path)
    if (path / manifest.NAME).is_file():
        return path
    if store.complete(path):
        return store.find(path)
    return None


def start_weights(
    load: str, ref_load: str | None, resume: str | None
) -> tuple[str, str | None, str | None]:
    """Where training and its reference began, if `load` or ref.load names a checkpoint of this
    program.

    Returns (load, ref.load, resume). A checkpoint is where a run is, never where it began. A run that
    goes on from it has its reference: what it began with, or what it was reset to, which the
    checkpoint holds. BadInput when the checkpoint is damaged, or ref.load alone names one whose
    reference was reset.
    """
    checkpoint = locate(load)
    if checkpoint is not None:
        start = CheckpointInfo.read(checkpoint).start
        load = start["actor_rollout"]
        ref_load = ref_load or start["ref"]
        resume = resume or str(checkpoint)
    if ref_load is not None:
        checkpoint = locate(ref_load)
    else:
        checkpoint = None
    if checkpoint is not None:
        ref_load = _start_of_reference(checkpoint, goes_on=resume is not None)
    return pinned(load), ref_load and pinned(ref_load), resume


def _start_of_reference(checkpoint: Path, goes_on: bool) -> str:
    """What the reference of a checkpoint began with."""
    info = CheckpointInfo.read(checkpoint)
    if info.progress.reference_version and not goes_on:
        raise BadInput(
            f"ref.load: the reference in {checkpoint} was reset after step "
            f"{info.progress.reference_version}, and only a run that goes on from there can have it; "
            f"name {info.start['ref']}, which it began with, or make a model folder of the checkpoint "
            "with tools/convert_ckpt.py to take its policy as reference"
        )
    return info.start["ref"]


def pinned(load: str) -> str:
    """A Megatron folder as the one iteration in it that its tracker names now: later saves may move
    the tracker."""
    try:
        if detect.is_megatron(Path(load)):
            return str(detect.detect(load).folder)
        return load
    except BadInput:
        return load  # the checks will say what is wrong with it


def find(checkpoints: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from: the newest one of the run's own folder, else the one that
    training.resume names.

    BadInput when it is named and not there.
    """
    own = store.find(checkpoints)
    if own is not None or resume is None:
        return own
    named = locate(resume)
    if named is None:
        below = Path(resume) / CHECKPOINTS
        if store.complete(below):
            way_out = f"those of this run folder are in {below}: name that"
        else:
            way_out = "give one, or leave the key out to start anew"
        raise BadInput(
            f"training.resume: {resume} is not a complete checkpoint of this "
            f"program, nor a folder of them with {store.TRACKER}; {way_out}"
        )
    return named


def check_resume(
    checkpoints: Path,
    resume: str | None,
    load: str,
    shape: ModelConfig,
    lora: LoraConfig | None = None,
) -> list[str]:
    """Return a sentence if the run would go on from a checkpoint that is damaged, of another model
    than `load`, whose shape is given, or of other adapters."""
    try:
        folder = find(checkpoints, resume)
        if folder is not None:
            _check(folder, load, shape)
            _check_adapters(folder, lora)
    except BadInput as error:
        return [f"resume: {error}"]
    return []


def _check(folder: Path, load: str, model: ModelConfig) -> None:
    try:
        manifest.check_sizes(folder)
        check_pickles(folder)
        record = CheckpointInfo.read(folder)
    except BadInput as error:
        raise BadInput(f"{error}{store.way_out(folder)}") from None
    shape = _flat(dataclasses.asdict(model))
    saved = {FORMER_NAMES.get(key, key): value for key, value in _flat(record.shape).items()}
    for key in sorted(shape.keys() | saved.keys()):
        if shape.get(key) != saved.get(key):
            raise BadInput(
                f"{folder} holds a model with {key} {saved.get(key)}, but "
                f"{load} has {shape.get(key)}; name the model that was trained, "
                "or another output_dir"
            )


def _check_adapters(folder: Path, lora: LoraConfig | None) -> None:
    """BadInput unless the adapters are those that the checkpoint holds; with none in either, all
    weights learn."""
    saved = CheckpointInfo.read(folder).lora or {"rank": None}
    asked: dict[str, Any] = {"rank": None}
    if lora is not None:
        asked = dataclasses.asdict(lora) | {"targets": list(lora.targets)}
    for key, value in asked.items():
        before = saved.get(key, value)
        if value != before:
            raise BadInput(
                f"{folder} was saved with actor_rollout.lora.{key} {shown(before)}, and the "
                f"configuration has {shown(value)}; set it to that, or name another output_dir to "
                "start anew"
            )


def changes(cfg_text: str, folder: Path) -> list[str]:
    """What differs between a configuration and the one that a checkpoint was saved with: "key old
    -> new"."""
    old = _flat(parse_dumped((folder / "config.yaml").read_text()))
    new = _flat(parse_dumped(cfg_text))
    return [
        f"{key} {old.get(key, 'default')} -> {new.get(key, 'default')}"
        for key in sorted(old.keys() | new.keys())
        if key not in PLACES and old.get(key) != new.get(key)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of keys as one level of dotted ones; tuples as the lists that files have of them."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, tuple):
            flat[f"{prefix}{key}"] = list(value)
        else:
            flat[f"{prefix}{key}"] = value
    return flat
