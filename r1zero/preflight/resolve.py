"""Resolve a configuration on this machine: what its disks, device and environment decide.

Reading a configuration looks at no disk. Here `~` and variables in paths are expanded, checkpoints
are followed to the weights that a run began with, and open defaults are filled in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from r1zero.checkpoint.resume import start_weights
from r1zero.config.keys import names_files
from r1zero.config.load import SECTIONS, read_config
from r1zero.config.paths import expand
from r1zero.config.schema import Config
from r1zero.config.validate import key_types
from r1zero.distributed.detect import uses_npu
from r1zero.errors import BadInput, readable
from r1zero.models.family import register_own
from r1zero.reward.choose import read_reward_settings
from r1zero.weights.detect import config_folder


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """Read and resolve a configuration; return it with warnings. BadInput for all mistakes."""
    cfg, warnings = read_config(name_or_path, overrides, read_reward_settings)
    return resolve_config(cfg), warnings


def resolve_config(cfg: Config) -> Config:
    """Fill in what this machine decides. BadInput with a sentence for each path that cannot be."""
    with readable():
        cfg = _expanded(cfg)
        register_own("training.model_families", cfg.training.model_families)
        load, ref_load, resume = start_weights(
            cfg.actor_rollout.load, cfg.ref.load, cfg.training.resume
        )
        training = cfg.training
        bf16 = training.bf16
        if bf16 is None:
            bf16 = uses_npu(training.distributed_backend)
        tokenizer = training.tokenizer_name_or_path or str(config_folder(load, fallback=load))
        return dataclasses.replace(
            cfg,
            training=dataclasses.replace(
                training, resume=resume, bf16=bf16, tokenizer_name_or_path=tokenizer
            ),
            actor_rollout=dataclasses.replace(cfg.actor_rollout, load=load),
            ref=dataclasses.replace(cfg.ref, load=ref_load or load),
        )


def _expanded(cfg: Config) -> Config:
    """Expand every key that names files, and reward functions of one's own."""
    problems: list[str] = []
    sections = {name: _with_paths(getattr(cfg, name), f"{name}.", problems) for name in SECTIONS}
    output_dir = _expand(cfg.output_dir, "output_dir", problems)
    if problems:
        raise BadInput("\n".join(problems))
    return dataclasses.replace(cfg, output_dir=output_dir, **sections)


def _with_paths(section: Any, where: str, problems: list[str]) -> Any:
    kind: Any = type(section)
    paths = {}
    for key, hint in key_types(kind).items():
        value = getattr(section, key)
        if isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
            paths[key] = {
                name: _with_paths(entry, f"{where}{key}.{name}.", problems)
                for name, entry in value.items()
            }
        elif value is not None and names_files(hint):
            paths[key] = _expand(value, f"{where}{key}", problems)
    return dataclasses.replace(section, **paths)


def _expand(value: Any, key: str, problems: list[str]) -> Any:
    """Expand a path, or each in a list."""
    if isinstance(value, list):
        return [_expand(entry, key, problems) for entry in value]
    try:
        return expand(value)
    except BadInput as error:
        problems.append(f"{key}: {error}")
        return value
