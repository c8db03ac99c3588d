"""Loading a configuration: YAML file, defaults and overrides merged into a Config, and back.

For each role the keys are merged: model file < `training` < the role's section < override. So a key
of a role may stand in any of the three. What is wrong is collected and raised once, a sentence
each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from r1zero.checkpoint.resume import start_weights
from r1zero.config import legacy, schema
from r1zero.config.parse import (
    SourcedValue,
    construct,
    convert,
    field_names,
    parse,
    read_yaml,
    spelled,
)
from r1zero.config.paths import expand
from r1zero.config.schema import ROOT, SHAPE_KEYS, Config
from r1zero.distributed.detect import uses_npu
from r1zero.errors import BadInput, Diagnostics, nearest, readable
from r1zero.weights.detect import config_folder

CONFIGS = ROOT / "configs"
EMBEDDED = ROOT / ".cache"  # where tools/make_tiny.py puts its model and data
SECTIONS: dict[str, type] = {
    "training": schema.Training,
    "actor_rollout": schema.ActorRollout,
    "ref": schema.Ref,
    "reward": schema.Reward,
    "algorithm": schema.Algorithm,
    "resource_pool": schema.ResourcePool,
}
TOP = (
    "name",
    "output_dir",
    "defaults",
    "model",
    "training",
    "actor_rollout_ref",
    "reward",
    "algorithm",
    "resource_pool",
)
# Keys that may stand in training, in a role or in a model file.
FREE_KEYS = (
    field_names(schema.Training)
    | field_names(schema.ActorRollout)
    | field_names(schema.Ref)
    | set(legacy.NO_EFFECT)
    | set(legacy.FIXED)
)


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """Read a configuration and return it with warnings. BadInput with a sentence for everything
    wrong.

    A bare name means configs/<name>.yaml; an override is `section.key=value`.
    """
    with readable():
        return _load(_find(expand(name_or_path)), overrides)


def _load(path: Path, overrides: Sequence[str]) -> tuple[Config, list[str]]:
    notes = Diagnostics()
    sections = _split(read_yaml(path), notes)
    for override in overrides:
        _override(sections, override, notes)
    models = _models(sections, path, notes)
    if notes.problems:
        cfg = None
    else:
        cfg = _build(sections, models, path.stem, notes)
    if cfg is not None:
        cfg = _with_paths(cfg, notes)
    if cfg is None or notes.problems:
        raise BadInput("\n".join(notes.problems))
    return dataclasses.replace(_resolve(cfg, notes), source=str(path)), notes.warnings


def dump(cfg: Config) -> str:
    """Write the resolved configuration as YAML that loads back to an equal Config."""
    tree = dataclasses.asdict(cfg)
    for section, kind in SECTIONS.items():
        defaults = {entry.name: entry.default for entry in dataclasses.fields(kind)}
        tree[section] = {
            key: value
            for key, value in tree[section].items()
            if value is not None
            and not (f"{section}.{key}" in legacy.NO_EFFECT_FIELDS and value == defaults[key])
        }
    kl_ctrl = tree["algorithm"]["kl_ctrl"]
    tree["algorithm"]["kl_ctrl"] = {
        key: value for key, value in kl_ctrl.items() if value is not None
    }
    tree["actor_rollout_ref"] = {role: tree.pop(role) for role in ("actor_rollout", "ref")}
    return yaml.safe_dump(
        {key: tree[key] for key in TOP if tree.get(key)}, sort_keys=False, width=110
    )


# -- reading --------------------------------------------------------------------------------------


def _find(name_or_path: str) -> Path:
    shipped = CONFIGS / (
        name_or_path if name_or_path.endswith((".yaml", ".yml")) else f"{name_or_path}.yaml"
    )
    for path in (Path(name_or_path), shipped):
        if path.is_file():
            return path
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    raise BadInput(
        f"--config {name_or_path}: there is no such file, nor {shipped}; shipped are "
        f"{', '.join(known)}{nearest(Path(name_or_path).stem, known)}"
    )


def _split(content: dict, notes: Diagnostics) -> dict[str, Any]:
    """Bring the roles to the top and check that sections are known mappings."""
    sections = {str(key).replace("-", "_"): value for key, value in content.items()}
    for key in sorted(set(sections) - set(TOP)):
        notes.refuse(
            f"{key} is not a section of the configuration{_place(key) or nearest(key, TOP)}"
        )
    sections = {key: sections[key] for key in TOP if sections.get(key) is not None}
    mappings = {key: sections.pop(key, {}) for key in (*SECTIONS, "actor_rollout_ref", "model")}
    if isinstance(mappings["actor_rollout_ref"], dict):
        roles = spelled(mappings.pop("actor_rollout_ref"))
        for key in sorted(set(roles) - {"actor_rollout", "ref"}):
            notes.refuse(
                f"actor_rollout_ref.{key} is unknown: it has the sections actor_rollout and ref"
            )
        mappings |= {role: _first_given(roles.get(role), {}) for role in ("actor_rollout", "ref")}
    for key, mapping in mappings.items():
        if not isinstance(mapping, dict):
            notes.refuse(f"{key}: {mapping!r} must be a section with keys")
            mapping = {}
        if key == "model":
            sections[key] = mapping
        else:
            sections[key] = spelled(mapping)
    return sections


def _place(key: str) -> str:
    """Say in which section a key belongs."""
    owners = [name for name, kind in SECTIONS.items() if key in field_names(kind)]
    if owners:
        return f"; did you mean {owners[0]}.{key}?"
    return ""


def _override(sections: dict[str, Any], text: str, notes: Diagnostics) -> None:
    """Set one `section.key=value`; the value is read as YAML."""
    name, equals, written = text.partition("=")
    path = [part.replace("-", "_") for part in name.strip().split(".")]
    if path[0] == "actor_rollout_ref":
        path = path[1:]
    try:
        value = parse(written)
    except yaml.YAMLError:
        value = written
    if not equals or not path:
        notes.refuse(f"the override {text!r} must have the form section.key=value")
    elif path[0] in ("name", "output_dir") and len(path) == 1:
        sections[path[0]] = value
    elif len(path) < 2 and path[0] in SECTIONS:
        notes.refuse(f"the override {text!r} must name a key of the section: {path[0]}.key=value")
    elif path[0] not in SECTIONS:
        notes.refuse(
            f"the override {text!r} must begin with one of the sections {', '.join(SECTIONS)}"
            f"{_place(path[-1]) or nearest(path[0], SECTIONS)}"
        )
    else:
        place = sections[path[0]]
        for part in path[1:-1]:
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
            if not isinstance(place, dict):
                notes.refuse(f"the override {text!r}: {part} has no keys of its own")
                return
        place[path[-1]] = value


def _models(sections: dict[str, Any], path: Path, notes: Diagnostics) -> dict[str, dict[str, Any]]:
    """Collect the model files that `defaults` names, and models written in the file itself."""
    inline = sections.get("model", {})
    entries = sections.get("defaults", [])
    models = {str(name): spelled(keys) for name, keys in inline.items() if isinstance(keys, dict)}
    for name in sorted(set(map(str, inline)) - set(models)):
        notes.refuse(
            f"model {name}: {inline.get(name)!r} must be a section with the keys of the model"
        )
    for entry in entries if isinstance(entries, list) else [entries]:
        if entry == "_self_":
            continue
        if not isinstance(entry, dict) or set(entry) != {"model"}:
            notes.refuse(
                f"defaults: {entry!r} is unknown; it lists model files: `- model: [qwen25-7b]`"
            )
            continue
        if isinstance(entry["model"], list):
            names = entry["model"]
        else:
            names = [entry["model"]]
        for name in map(str, names):
            models.setdefault(name, _model_file(name, path, notes))
    for name, keys in models.items():
        _refuse_unknown(keys, FREE_KEYS | set(SHAPE_KEYS), f"model {name}: ", notes)
    return models


def _model_file(name: str, path: Path, notes: Diagnostics) -> dict[str, Any]:
    folders = (path.parent / "model", CONFIGS / "model")
    for file in (folder / f"{name}.yaml" for folder in folders):
        if file.is_file():
            content = read_yaml(file)
            if list(content) == [name] and isinstance(content[name], dict):
                return spelled(content[name])
            notes.refuse(
                f"{file} must have the one top-level key {name}, with the model's keys below it"
            )
            return {}
    known = {file.stem for folder in folders for file in folder.glob("*.yaml")}
    notes.refuse(
        f"defaults: there is no model file {name}.yaml in {' or '.join(map(str, folders))}"
        f"{nearest(name, known)}"
    )
    return {}


# -- building -------------------------------------------------------------------------------------


def _build(
    sections: dict[str, Any], models: dict[str, dict], stem: str, notes: Diagnostics
) -> Config | None:
    """Merge, check and type all sections. Returns None, with problems noted, when that fails."""
    for section, kind in SECTIONS.items():
        own = field_names(kind)
        if section in ("algorithm", "resource_pool"):
            accepted = own
        else:
            accepted = own | FREE_KEYS
        _refuse_unknown(sections[section], accepted, f"{section}.", notes)
        _note_ineffective(section, sections[section], own, notes)
    merged = {role: _merge(role, sections, models, notes) for role in ("actor_rollout", "ref")}
    _refuse_two_values(sections["ref"], merged["actor_rollout"], notes)
    built: dict[str, Any] = {}
    for section, kind in SECTIONS.items():
        given = merged.get("actor_rollout" if section == "training" else section)
        if given is None:
            given = {
                key: SourcedValue(value, f"{section}.{key}")
                for key, value in sections[section].items()
            }
        built[section] = construct(kind, given, section, notes)
    name = convert(sections.get("name", stem), str, "name", notes)
    output_dir = convert(sections.get("output_dir", f"runs/{name}"), str, "output_dir", notes)
    used = {built[role].model for role in ("actor_rollout", "ref") if built[role] is not None}
    shapes = {}
    for model, keys in models.items():
        if model in used:
            shapes[model] = {
                key: convert(keys[key], kind, f"model {model}: {key}", notes)
                for key, kind in SHAPE_KEYS.items()
                if keys.get(key) is not None
            }
    if notes.problems:
        return None
    return Config(name=name, output_dir=output_dir, model=shapes, **built)


def _refuse_unknown(mapping: dict, accepted: set[str], where: str, notes: Diagnostics) -> None:
    for key in mapping:
        if key in accepted:
            if (
                key in legacy.FIXED
                and mapping[key] is not None
                and mapping[key] not in legacy.FIXED[key][0]
            ):
                values, reason = legacy.FIXED[key]
                notes.refuse(
                    f"{where}{key}: {mapping[key]!r} is not supported, only {values[0]!r}: {reason}"
                )
        elif key in SHAPE_KEYS:
            notes.refuse(
                f"{where}{key} describes the network: put it into a model file under configs/model/"
            )
        else:
            notes.refuse(f"{where}{key} is unknown{nearest(key, accepted) or _place(key)}")


def _note_ineffective(section: str, mapping: dict, own: set[str], notes: Diagnostics) -> None:
    for key in mapping:
        where = f"{section}.{key}"
        if where in legacy.NO_EFFECT_FIELDS:
            notes.ignore(where, legacy.NO_EFFECT_FIELDS[where])
        elif section == "reward" and key not in own:
            notes.ignore(where, "rules score the responses, there is no reward model")
        elif key in legacy.NO_EFFECT:
            notes.ignore(where, legacy.NO_EFFECT[key])
        elif section == "ref" and key in field_names(schema.ActorRollout) - own:
            notes.ignore(where, "the reference model neither learns nor generates")


def _merge(
    role: str, sections: dict[str, Any], models: dict[str, dict], notes: Diagnostics
) -> dict[str, SourcedValue]:
    """Merge the keys of a role: model file < training < the role's section."""
    if role == "ref" and sections["ref"].get("model") is not None:
        owner = "ref"
    else:
        owner = "actor_rollout"
    name = sections[owner].get("model")
    if name is not None and str(name) not in models:
        notes.refuse(
            f"{owner}.model: {name} is not listed under defaults: add `- model: [{name}]`"
            f"{nearest(str(name), models)}"
        )
    from_file = models.get(str(name), {})
    layers = (
        (f"model {name}: ", from_file),
        ("training.", sections["training"]),
        (f"{role}.", sections[role]),
    )
    for key in from_file:
        if key in legacy.NO_EFFECT and role == "actor_rollout":
            notes.ignore(f"model {name}: {key}", legacy.NO_EFFECT[key])
    return {
        key: SourcedValue(value, f"{where}{key}")
        for where, mapping in layers
        for key, value in mapping.items()
    }


def _refuse_two_values(
    ref: dict[str, Any], actor: dict[str, SourcedValue], notes: Diagnostics
) -> None:
    """A run has one value of each key of `training`; a ref section that asks for another is
    refused."""
    for entry in dataclasses.fields(schema.Training):
        value = ref.get(entry.name)
        if value is not None and (entry.name not in actor or value != actor[entry.name].value):
            notes.refuse(
                f"ref.{entry.name}: {value!r} is not what holds for the run; "
                f"set training.{entry.name}, which all roles share"
            )


# -- defaults that follow from other keys ---------------------------------------------------------


PATHS: dict[str, tuple[str, ...]] = {
    "training": ("tokenizer_name_or_path", "prompt_type_path", "resume", "eval_data_path"),
    "actor_rollout": ("load", "data_path", "save"),
    "ref": ("load",),
}


def _with_paths(cfg: Config, notes: Diagnostics) -> Config:
    """Expand `~` and variables in every key that names files, and in scorers of one's own."""
    sections = {}
    for section, keys in PATHS.items():
        holder = getattr(cfg, section)
        sections[section] = dataclasses.replace(holder, **_expanded(holder, section, keys, notes))
    algorithm = cfg.algorithm
    scorers = [
        _expand(scorer, "algorithm.verifier_function", notes)
        for scorer in algorithm.verifier_function
    ]
    sections["algorithm"] = dataclasses.replace(algorithm, verifier_function=scorers)
    return dataclasses.replace(
        cfg, output_dir=_expand(cfg.output_dir, "output_dir", notes), **sections
    )


def _expanded(holder: Any, section: str, keys: Sequence[str], notes: Diagnostics) -> dict[str, str]:
    """The given ones of these keys of a section, expanded."""
    given = {key: getattr(holder, key) for key in keys if getattr(holder, key) is not None}
    return {key: _expand(value, f"{section}.{key}", notes) for key, value in given.items()}


def _expand(text: str, key: str, notes: Diagnostics) -> str:
    try:
        return expand(text)
    except BadInput as error:
        notes.refuse(f"{key}: {error}")
        return text


def _resolve(cfg: Config, notes: Diagnostics) -> Config:
    """Fill in the defaults that depend on other keys."""
    training = cfg.training
    actor = cfg.actor_rollout
    ref = cfg.ref
    pool = cfg.resource_pool
    load, ref_load, resume = start_weights(
        embedded(actor.load, "model"), ref.load and embedded(ref.load, "model"), training.resume
    )
    train_tp = actor.tensor_model_parallel_size
    infer_tp = _first_given(actor.infer_tensor_parallel_size, train_tp)
    replica = ref.tensor_model_parallel_size * ref.pipeline_model_parallel_size
    if training.sequence_parallel and train_tp == 1:
        notes.ignore(
            "training.sequence_parallel", "tensor_model_parallel_size is 1, so nothing is cut"
        )
    ranks = actor.num_gpus_for_train + actor.num_gpus_for_infer
    ref_pool = pool.ref or [replica]
    if pool.colocate:
        ranks = max(train_tp * actor.pipeline_model_parallel_size, infer_tp, replica)
        ref_pool = pool.ref
    eval_data = training.eval_data_path
    if training.eval_interval is not None and eval_data is None:
        notes.ignore("training.eval_interval", "there is no eval_data_path to evaluate on")
    if training.eval_map_keys is not None and eval_data is None:
        notes.ignore("training.eval_map_keys", "there is no eval_data_path to evaluate on")
    return dataclasses.replace(
        cfg,
        training=dataclasses.replace(
            training,
            resume=resume,
            map_keys=schema.MAP_KEYS | training.map_keys,
            bf16=uses_npu(training.distributed_backend) if training.bf16 is None else training.bf16,
            sequence_parallel=training.sequence_parallel and train_tp > 1,
            tokenizer_name_or_path=embedded(
                training.tokenizer_name_or_path or str(config_folder(load, fallback=load)), "model"
            ),
            prompt_type_path=training.prompt_type_path or str(CONFIGS / "templates.json"),
            eval_data_path=eval_data and embedded(eval_data, "eval"),
            eval_temperature=_first_given(training.eval_temperature, actor.temperature),
            eval_top_p=_first_given(training.eval_top_p, actor.top_p),
            eval_top_k=_first_given(training.eval_top_k, actor.top_k),
        ),
        actor_rollout=dataclasses.replace(
            actor,
            load=load,
            data_path=embedded(actor.data_path, "train"),
            infer_tensor_parallel_size=infer_tp,
            clip_ratio_low=_first_given(actor.clip_ratio_low, actor.clip_ratio),
            clip_ratio_high=_first_given(actor.clip_ratio_high, actor.clip_ratio),
        ),
        ref=dataclasses.replace(ref, load=ref_load or load, model=ref.model or actor.model),
        algorithm=dataclasses.replace(
            cfg.algorithm,
            advantage=_first_given(cfg.algorithm.advantage, cfg.algorithm.adv_estimator),
        ),
        resource_pool=dataclasses.replace(
            pool, actor_rollout=pool.actor_rollout or [ranks], ref=ref_pool
        ),
    )


def _first_given(value: Any, default: Any) -> Any:
    if value is None:
        return default
    return value


def embedded(path: str, part: str) -> str:
    """Turn `embedded:tiny` into the place of its model, train or eval part; other paths stay as
    they are.

    `embedded:tiny/eval` names the part itself.
    """
    if not path.startswith("embedded:"):
        return path
    name, _, chosen = path.removeprefix("embedded:").partition("/")
    parts = {"model": "model", "train": "train.parquet", "eval": "eval.parquet"}
    if name != "tiny" or (chosen or part) not in parts:
        raise BadInput(
            f"{path} is unknown; embedded are embedded:tiny and, of its parts, "
            + ", ".join(f"embedded:tiny/{known}" for known in parts)
        )
    return str(EMBEDDED / name / parts[chosen or part])
