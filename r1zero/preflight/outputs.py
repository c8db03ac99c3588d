"""What a run writes, looked at before it starts: whose its folders are, what lies in them, and
whether there is room.

A run that cannot go on from a checkpoint moves the earlier run in its folder aside; then nothing
that it reads may lie there.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from r1zero.checkpoint import resume
from r1zero.checkpoint.progress import CheckpointInfo
from r1zero.config.own_code import own_files
from r1zero.config.schema import Config
from r1zero.errors import BadInput
from r1zero.models.lora import lora_config, trained_parameters
from r1zero.models.sizes import OPTIMIZER_BYTES
from r1zero.preflight.datasets import data_sets
from r1zero.preflight.files import check_weights
from r1zero.preflight.found import Found, dtype_of
from r1zero.run_folder.exported import MODEL, exported_step, in_the_way
from r1zero.run_folder.folder import aside_of, check_aside, check_writable, holds_run
from r1zero.run_folder.owner import check_free


def check_outputs(found: Found) -> list[str]:
    """Return a sentence for everything that stands against writing where the run is to write."""
    cfg = found.config
    folder = Path(cfg.output_dir)
    if Path.cwd().is_relative_to(os.path.realpath(folder)):  # an earlier run there is moved aside
        return [
            f"output_dir: {cfg.output_dir or 'nothing'} is the current directory or around it; "
            "name a folder of its own"
        ]
    problems = check_writable("output_dir", cfg.output_dir)
    if cfg.actor_rollout.save:
        problems += check_writable("actor_rollout.save", cfg.actor_rollout.save)
    problems = problems or check_free("output_dir", folder)
    problems = problems or check_free("actor_rollout.save", cfg.checkpoints)
    try:
        checkpoint = resume.find(cfg.checkpoints, cfg.training.resume)
        if problems or is_done(cfg, checkpoint):
            return problems
        return check_content(cfg, checkpoint, found.actor.folder) or check_disk(found)
    except BadInput:
        return problems  # the checks of what the run reads say what is wrong


def check_content(cfg: Config, checkpoint: Path | None, source: Path) -> list[str]:
    """What lies in the run folder already, for a run that goes on from `checkpoint` and whose model
    is described in the folder `source`."""
    anew = starts_anew(cfg, checkpoint)
    if anew and holds_run(Path(cfg.output_dir)):
        return check_moved(cfg)
    problem = in_the_way(Path(cfg.output_dir) / MODEL, source, may_replace=not anew)
    if problem is not None:
        return [f"output_dir: {problem}, or name another output_dir"]
    return []


def claimed(cfg: Config) -> dict[str, Path]:
    """The folders that the run takes for itself, by their keys; what lies in them belongs to it."""
    folders = {"output_dir": Path(cfg.output_dir)}
    save = Path(os.path.realpath(cfg.checkpoints))
    if not save.is_relative_to(os.path.realpath(cfg.output_dir)):
        folders["actor_rollout.save"] = cfg.checkpoints
    return folders


# -- what is moved aside --------------------------------------------------------------------------


def starts_anew(cfg: Config, checkpoint: Path | None) -> bool:
    """Whether a run that goes on from `checkpoint` begins a new run folder."""
    return checkpoint is None or checkpoint.parent != cfg.checkpoints


def check_moved(cfg: Config) -> list[str]:
    """The earlier run, which is to be moved aside, must let itself be moved, and hold no input."""
    folder = Path(cfg.output_dir)
    real = Path(os.path.realpath(folder))
    inside = {path: key for key, path in reversed(_read(cfg)) if _lies_in(path, real)}
    problems = [
        f"{key}: {path} lies in output_dir {folder}, and the earlier run there, which left "
        "no checkpoint to go on from, would be moved aside with it, to "
        f"{aside_of(folder)}.1; name another output_dir, or move it out of there"
        for path, key in inside.items()
    ]
    return problems or check_aside("output_dir", folder)


def _read(cfg: Config) -> list[tuple[str, str]]:
    """(key, path) of everything that the run reads."""
    training = cfg.training
    actor = cfg.actor_rollout
    named = [
        ("actor_rollout.load", actor.load),
        ("ref.load", cfg.ref.load if cfg.has_reference else None),
        ("training.tokenizer_name_or_path", training.tokenizer_name_or_path),
        ("reward.load", cfg.reward.load if cfg.has_reward_model else None),
        ("reward.tokenizer_name_or_path", cfg.reward.tokenizer_name_or_path),
        ("training.resume", training.resume),
        ("training.prompt_type_path", training.prompt_type_path),
    ]
    rewards = own_files(cfg.algorithm.verifier_function)
    named += [("algorithm.verifier_function", path) for path in rewards]
    for source in data_sets(cfg)[0]:
        named.append((source.key, source.path))
        named += [(source.scorers_key, path) for path in own_files(list(source.scorers))]
    families = own_files(training.model_families)
    named += [("training.model_families", path) for path in families]
    named += [("actor_rollout.engine", path) for path in own_files([actor.engine])]
    objective = {
        "loss": cfg.algorithm.loss,
        "advantage": cfg.algorithm.advantage,
        "aggregation": cfg.algorithm.aggregation,
    }
    for key, name in objective.items():
        named += [(f"algorithm.{key}", path) for path in own_files([name or ""])]
    own = os.path.realpath(Path(cfg.output_dir) / "config.yaml")
    if cfg.source is not None and os.path.realpath(cfg.source) != own:  # which is written again
        named.append(("--config", cfg.source))
    return [(key, path) for key, path in named if path is not None]


def _lies_in(path: str, real: Path) -> bool:
    """Whether a path, or what it links to, lies in the folder `real`."""
    parent, name = os.path.split(os.path.abspath(path))
    itself = Path(os.path.realpath(parent)) / name
    return itself.is_relative_to(real) or Path(os.path.realpath(path)).is_relative_to(real)


# -- the trained model ----------------------------------------------------------------------------


def is_done(cfg: Config, checkpoint: Path | None) -> bool:
    """Whether a run that goes on from `checkpoint` has nothing to do: trained, and the model whole.

    BadInput when the checkpoint cannot be read.
    """
    if starts_anew(cfg, checkpoint):
        return False
    assert checkpoint is not None, "else the run starts anew"
    done = CheckpointInfo.read(checkpoint).progress
    folder = Path(cfg.output_dir) / MODEL
    is_exported = exported_step(folder) == done.step and not check_weights("", folder, folder)
    is_trained = done.is_trained(cfg.training.train_iters, cfg.training.stop_at)
    return is_trained and is_exported


def check_disk(found: Found) -> list[str]:
    """Room for the trained model, and for one checkpoint where they are saved."""
    cfg = found.config
    shape = found.actor.shape
    if shape is None:
        return []
    weights = shape.num_parameters * dtype_of(cfg).itemsize
    problems = _check_room("output_dir", Path(cfg.output_dir), weights, "the trained model")
    if not cfg.training.save_interval or problems:
        return problems
    learning = trained_parameters(shape, lora_config(cfg.actor_rollout))
    needed = learning * (dtype_of(cfg).itemsize + OPTIMIZER_BYTES)
    what = "a checkpoint"
    if _disk(cfg.checkpoints) == _disk(Path(cfg.output_dir)):
        needed = needed + weights
        what = "the trained model and a checkpoint"
    return _check_room("actor_rollout.save", cfg.checkpoints, needed, what)


def _check_room(key: str, folder: Path, needed: int, what: str) -> list[str]:
    """`needed` in bytes."""
    free = shutil.disk_usage(existing(folder)).free
    if free >= needed:
        return []
    return [
        f"{key}: {folder} has {free / 1e9:.3g} GB free and needs {needed / 1e9:.3g} GB for "
        f"{what}; free some, or name a folder on another disk"
    ]


def _disk(folder: Path) -> int:
    return existing(folder).stat().st_dev


def existing(path: Path) -> Path:
    """The path or its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return path
