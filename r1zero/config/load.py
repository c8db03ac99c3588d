"""Loading a configuration: YAML file, defaults and overrides merged into a Config, and back.

Of disks only the YAML files are read.

For each role the keys are merged: model file < `training` < the role's section < override. So a
key of a role may stand in any of the three. A preset lies over the model file and below the rest
(presets.py). What is wrong is collected and raised once, a sentence each. What the machine decides,
such as bf16 where it is left open, is filled in by `preflight/resolve.py`.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from r1zero.config import legacy, schema
from r1zero.config.keys import MAP_KEYS, FilePath, Text
from r1zero.config.overrides import Overrides, read_overrides
from r1zero.config.parse import SourcedValue, read_yaml, spelled
from r1zero.config.paths import expand
from r1zero.config.presets import Preset, Sections, describe, lay_over, read_preset
from r1zero.config.rules import check_sound_keys
from r1zero.config.schema import ADVANTAGE, CONFIGS, Config
from r1zero.config.sections import (
    FREE_KEYS,
    NETWORK_KEYS,
    SECTIONS,
    TOP,
    accepted_keys,
    known_keys,
    refuse_unknown,
    split,
)
from r1zero.config.settings import SettingsReader, as_given, given_settings
from r1zero.config.unread import note_unread
from r1zero.config.validate import build, field_names, value_of
from r1zero.errors import BadInput, Diagnostics, nearest, readable

# Written in C where libyaml is there, as every rank writes its configuration when it starts.
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class WrongKeys(BadInput):
    """Keys are wrong. `sound` is the configuration without them: to read one of them raises
    AttributeError."""

    def __init__(self, problems: Sequence[str], sound: Config) -> None:
        super().__init__("\n".join(problems))
        self.sound = sound


def read_config(
    name_or_path: str, overrides: Sequence[str] = (), read_settings: SettingsReader = as_given
) -> tuple[Config, list[str]]:
    """Read a configuration and return it with warnings. BadInput with a sentence for each mistake.

    A bare name means configs/<name>.yaml; an override is `section.key=value`, or `algorithm=preset`.
    `read_settings` knows what stands below reward.settings. Each key by itself is right then. Rules
    among keys are told here when a key is wrong, else by the checks before a start, together with
    what is wrong with files.
    """
    with readable():
        return _read(_find(expand(name_or_path)), overrides, read_settings)


def _read(
    path: Path, texts: Sequence[str], read_settings: SettingsReader
) -> tuple[Config, list[str]]:
    notes = Diagnostics()
    sections = split(read_yaml(path), notes)
    wrong_sections = list(notes.problems)
    overrides = read_overrides(texts, sections, notes)
    named = _named_files(sections.get("defaults", []), notes)
    preset = read_preset(overrides.preset or named.preset, path.parent, notes)
    models = _models(sections["model"], named.models, path, notes)
    if wrong_sections:  # their keys would all seem to be missing
        raise BadInput("\n".join(notes.problems))
    sections |= overrides.top | _layers(sections, preset, overrides)
    cfg = _build(sections, models, path, read_settings, notes)
    if preset is not None:
        cfg = dataclasses.replace(cfg, preset=describe(preset, sections))
    if notes.problems:
        raise WrongKeys([*notes.problems, *check_sound_keys(cfg)], cfg)
    return _with_defaults(cfg, notes), notes.warnings


def dump(cfg: Config) -> str:
    """Write the resolved configuration as YAML that loads back to an equal Config. Above it, what a
    preset set."""
    tree = dataclasses.asdict(cfg)
    for section, kind in SECTIONS.items():
        tree[section] = _told_keys(section, kind, tree[section])
    for name in ("kl_ctrl", "entropy_ctrl"):
        tree["algorithm"][name] = _without_nulls(tree["algorithm"][name])
    tree["actor_rollout"]["lora"] = _without_nulls(tree["actor_rollout"]["lora"])
    for sets in (tree["training"]["evaluation"], tree["actor_rollout"]["data_path"]):
        if isinstance(sets, dict):
            for name, entry in sets.items():
                sets[name] = _without_nulls(entry)
    tree["actor_rollout_ref"] = {role: tree.pop(role) for role in ("actor_rollout", "ref")}
    told = {key: tree[key] for key in TOP if tree.get(key)}
    text = yaml.dump(told, Dumper=_DUMPER, sort_keys=False, width=110)
    if cfg.preset is not None:
        text = _comment(cfg.preset) + text
    return text


def _comment(text: str) -> str:
    lines = textwrap.wrap(text, 108, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _told_keys(section: str, kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is null, and keys without effect that say what they say anyway."""
    told = _without_nulls(values)
    for entry in dataclasses.fields(kind):
        has_effect = f"{section}.{entry.name}" not in legacy.NO_EFFECT_FIELDS
        if not has_effect and told.get(entry.name) == entry.default:
            told.pop(entry.name, None)
    return told


# -- reading --------------------------------------------------------------------------------------


def _find(name_or_path: str) -> Path:
    is_file_name = name_or_path.endswith((".yaml", ".yml"))
    shipped = CONFIGS / (name_or_path if is_file_name else f"{name_or_path}.yaml")
    for path in (Path(name_or_path), shipped):
        if path.is_file():
            return path
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    raise BadInput(
        f"--config {name_or_path}: there is no such file, nor {shipped}; shipped are "
        f"{', '.join(known)}{nearest(Path(name_or_path).stem, known)}"
    )


@dataclasses.dataclass(slots=True)
class _NamedFiles:
    """What `defaults` names."""

    models: list[str]
    preset: str | None = None


def _named_files(defaults: Any, notes: Diagnostics) -> _NamedFiles:
    """Read `defaults`: model files, one or a list under `model`, and a preset under `algorithm`."""
    found = _NamedFiles(models=[])
    for entry in defaults if isinstance(defaults, list) else [defaults]:
        if entry == "_self_":
            continue
        if isinstance(entry, dict) and set(entry) == {"model"}:
            names = entry["model"]
            found.models += map(str, names if isinstance(names, list) else [names])
        elif isinstance(entry, dict) and set(entry) == {"algorithm"}:
            _name_preset(found, entry["algorithm"], notes)
        else:
            notes.refuse(
                f"defaults: {entry!r} is unknown; it lists model files, `- model: [qwen25-7b]`, and "
                "a preset, `- algorithm: dapo`"
            )
    return found


def _name_preset(found: _NamedFiles, name: Any, notes: Diagnostics) -> None:
    if not isinstance(name, str):
        notes.refuse(f"defaults: algorithm: {name!r} must be the name of a preset, such as dapo")
    elif found.preset not in (None, name):
        notes.refuse(f"defaults: algorithm is given twice, as {found.preset} and {name}; keep one")
    else:
        found.preset = name


def _layers(
    sections: dict[str, Any], preset: Preset | None, overrides: Overrides
) -> dict[str, Any]:
    """The keys of file, preset and command line: each layer's over those below it."""
    layers: list[Sections] = [{section: sections[section] for section in SECTIONS}]
    if preset is not None and overrides.preset is not None:
        layers.append(preset.sections)
    elif preset is not None:
        layers.insert(0, preset.sections)
    layers.append(overrides.sections)
    lowest, *others = layers
    merged: dict[str, Any] = dict(lowest)
    for layer in others:
        merged = lay_over(merged, layer)
    return merged


def _models(
    written: dict[str, Any], named: Sequence[str], path: Path, notes: Diagnostics
) -> dict[str, dict[str, Any]]:
    """Read the model files that `defaults` names, beside models written in the file itself."""
    models = {}
    for name, keys in written.items():
        if isinstance(keys, dict):
            models[str(name)] = spelled(keys)
        else:
            notes.refuse(f"model {name}: {keys!r} must be a section with the keys of the model")
    for name in named:
        if name not in models:
            models[name] = _model_file(name, path, notes)
    for name, keys in models.items():
        refuse_unknown(keys, FREE_KEYS | NETWORK_KEYS, f"model {name}: ", notes)
    return models


def _model_file(name: str, path: Path, notes: Diagnostics) -> dict[str, Any]:
    """Read the file of a model, beside the configuration or among those shipped."""
    folders = (path.parent / "model", CONFIGS / "model")
    for folder in folders:
        file = folder / f"{name}.yaml"
        if not file.is_file():
            continue
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
    sections: dict[str, Any],
    models: dict[str, dict[str, Any]],
    path: Path,
    read_settings: SettingsReader,
    notes: Diagnostics,
) -> Config:
    """Merge, check and type all sections. With problems noted, wrong keys are left out of them."""
    given = _given(sections, models, notes)
    _leave_rewards_to_the_model(given, notes)
    settings = read_settings(given_settings(sections["reward"], notes), notes)
    given["reward"]["settings"] = SourcedValue(settings, "reward.settings")
    built: dict[str, Any] = {}
    for section, kind in SECTIONS.items():
        built[section] = build(kind, given[section], section, notes)
    name = value_of(Text, sections.get("name", path.stem), "name", notes)
    output_dir = value_of(FilePath, sections.get("output_dir", f"runs/{name}"), "output_dir", notes)
    roles = ("actor_rollout", "ref", "reward")
    used = {getattr(built[role], "model", None) for role in roles}
    networks = {
        model: _network(model, keys, notes) for model, keys in models.items() if model in used
    }
    return Config(name=name, output_dir=output_dir, model=networks, source=str(path), **built)


def _given(
    sections: dict[str, Any], models: dict[str, dict[str, Any]], notes: Diagnostics
) -> dict[str, dict[str, SourcedValue]]:
    """The values of each section's own keys, wherever they stand. Unknown keys are refused."""
    actor = _merge("actor_rollout", sections, models, notes)
    ref = _merge("ref", sections, models, notes)
    _refuse_two_values(sections["ref"], actor, notes)
    merged = {"training": actor, "actor_rollout": actor, "ref": ref}
    given = {}
    for section, kind in SECTIONS.items():
        own = field_names(kind)
        refuse_unknown(sections[section], accepted_keys(section), f"{section}.", notes)
        _note_ineffective(section, sections[section], known_keys(section), notes)
        everything = merged.get(section) or _placed(sections[section], f"{section}.")
        given[section] = {key: item for key, item in everything.items() if key in own}
    return given


def _leave_rewards_to_the_model(
    given: dict[str, dict[str, SourcedValue]], notes: Diagnostics
) -> None:
    """A configuration that names a reward model and no reward function at all has the model's rewards
    alone, as those of MindSpeed-LLM that were written for one."""
    ranks = given["resource_pool"].get("reward")
    if ranks is None or ranks.value in (None, [], [0]):
        return
    sets = given["actor_rollout"].get("data_path")
    entries = sets.value.values() if sets is not None and isinstance(sets.value, dict) else ()
    names_rules = any(
        isinstance(entry, dict) and entry.get("verifier_function") for entry in entries
    )
    if names_rules or "verifier_function" in given["algorithm"] or "verifier" in given["reward"]:
        return
    given["reward"]["verifier"] = SourcedValue(False, "reward.verifier")
    notes.remark(
        "reward.verifier is false, since the configuration names a reward model and no reward function: "
        "the reward is the model's alone; name algorithm.verifier_function, or set it to true"
    )


def _placed(mapping: dict[str, Any], where: str) -> dict[str, SourcedValue]:
    return {key: SourcedValue(value, f"{where}{key}") for key, value in mapping.items()}


def _network(model: str, keys: dict[str, Any], notes: Diagnostics) -> dict[str, Any]:
    """What a model file says about the network."""
    own = {key: value for key, value in keys.items() if key in NETWORK_KEYS}
    given = _placed(own, f"model {model}: ")
    before = len(notes.problems)
    network = build(schema.Network, given, f"model {model}", notes)
    if len(notes.problems) > before:
        return {}
    return {key: value for key, value in dataclasses.asdict(network).items() if value is not None}


def _note_ineffective(section: str, mapping: dict, own: set[str], notes: Diagnostics) -> None:
    for key in mapping:
        where = f"{section}.{key}"
        if where in legacy.NO_EFFECT_FIELDS:
            notes.ignore(where, legacy.NO_EFFECT_FIELDS[where])
        elif section == "reward" and key not in own:
            notes.ignore(where, "a reward model neither learns nor generates")
        elif key in legacy.NO_EFFECT:
            notes.ignore(where, legacy.NO_EFFECT[key])
        elif section == "ref" and key in field_names(schema.ActorRollout) - own:
            notes.ignore(where, "the reference model neither learns nor generates")


def _merge(
    role: str, sections: dict[str, Any], models: dict[str, dict], notes: Diagnostics
) -> dict[str, SourcedValue]:
    """Merge the keys of a role: model file < training < the role's section."""
    owner = "ref" if role == "ref" and sections["ref"].get("model") is not None else "actor_rollout"
    name = sections[owner].get("model")
    if name is not None and str(name) not in models:
        notes.refuse(
            f"{owner}.model: {name} is not listed under defaults: add `- model: [{name}]`"
            f"{nearest(str(name), models)}"
        )
    from_file = models.get(str(name), {})
    for key in from_file:
        if key in legacy.NO_EFFECT and role == "actor_rollout":
            notes.ignore(f"model {name}: {key}", legacy.NO_EFFECT[key])
    return (
        _placed(from_file, f"model {name}: ")
        | _placed(sections["training"], "training.")
        | _placed(sections[role], f"{role}.")
    )


def _refuse_two_values(
    ref: dict[str, Any], actor: dict[str, SourcedValue], notes: Diagnostics
) -> None:
    """Refuse a ref section that asks for another value of a key of `training` than the run has."""
    for entry in dataclasses.fields(schema.Training):
        value = ref.get(entry.name)
        if value is not None and (entry.name not in actor or value != actor[entry.name].value):
            notes.refuse(
                f"ref.{entry.name}: {value!r} is not what holds for the run; "
                f"set training.{entry.name}, which all roles share"
            )


# -- defaults that follow from other keys ---------------------------------------------------------


def _with_defaults(cfg: Config, notes: Diagnostics) -> Config:
    """Fill in the defaults that depend on other keys alone."""
    note_unread(cfg, notes)
    return dataclasses.replace(
        cfg,
        training=_training(cfg, notes),
        actor_rollout=_actor(cfg),
        ref=dataclasses.replace(cfg.ref, model=cfg.ref.model or cfg.actor_rollout.model),
        algorithm=dataclasses.replace(
            cfg.algorithm,
            advantage=cfg.algorithm.advantage or cfg.algorithm.adv_estimator or ADVANTAGE,
        ),
        resource_pool=_pool(cfg),
    )


def _training(cfg: Config, notes: Diagnostics) -> schema.Training:
    training = cfg.training
    actor = cfg.actor_rollout
    cuts_nothing = actor.tensor_model_parallel_size == 1
    training = dataclasses.replace(
        training,
        map_keys=MAP_KEYS | training.map_keys,
        sequence_parallel=training.sequence_parallel and not cuts_nothing,
        prompt_type_path=training.prompt_type_path or str(CONFIGS / "templates.json"),
        eval_temperature=_first_given(training.eval_temperature, actor.temperature),
        eval_top_p=_first_given(training.eval_top_p, actor.top_p),
        eval_top_k=_first_given(training.eval_top_k, actor.top_k),
    )
    sets = {name: _evaluation_set(entry, training) for name, entry in training.evaluation.items()}
    sets = {name: _with_scorers(entry, cfg.algorithm) for name, entry in sets.items()}
    return _meeting(dataclasses.replace(training, evaluation=sets), notes)


def _meeting(training: schema.Training, notes: Diagnostics) -> schema.Training:
    """With keep_best, the steps that are evaluated and those that save meet, and a score is named."""
    if training.keep_best is None or not training.evaluates:
        return training
    prefix = ""
    if training.eval_data_path is None:
        prefix = f"{next(iter(training.evaluation))}/"
    best_score = training.best_score or f"{prefix}pass@1"
    save = training.save_interval
    interval = training.eval_interval
    if save and interval and save % interval and interval % save:
        rounded = -(-interval // save) * save
        notes.remark(
            f"training.eval_interval: {interval} becomes {rounded}, so that evaluations meet the "
            f"checkpoints of save_interval {save}, of which keep_best keeps the best"
        )
        interval = rounded
    return dataclasses.replace(training, best_score=best_score, eval_interval=interval)


def _evaluation_set(entry: schema.EvaluationSet, training: schema.Training) -> schema.EvaluationSet:
    """What a named set leaves out is as for eval_data_path."""
    samples = _first_given(entry.samples_per_prompt, training.eval_samples_per_prompt)
    return dataclasses.replace(
        entry,
        samples_per_prompt=samples,
        temperature=_first_given(entry.temperature, training.eval_temperature),
        top_p=_first_given(entry.top_p, training.eval_top_p),
        top_k=_first_given(entry.top_k, training.eval_top_k),
        prompt_type=_first_given(entry.prompt_type, training.prompt_type),
    )


DataSet = TypeVar("DataSet", schema.TrainingSet, schema.EvaluationSet)


def _with_scorers(entry: DataSet, algorithm: schema.Algorithm) -> DataSet:
    """A set without reward functions of its own has those of the run."""
    functions = _first_given(entry.verifier_function, algorithm.verifier_function)
    weights = entry.verifier_weight
    if weights is None and entry.verifier_function is None:
        weights = algorithm.verifier_weight
    elif weights is None:
        weights = [1 / len(functions)] * len(functions)
    return dataclasses.replace(entry, verifier_function=functions, verifier_weight=weights)


def _actor(cfg: Config) -> schema.ActorRollout:
    actor = cfg.actor_rollout
    infer_tp = _first_given(actor.infer_tensor_parallel_size, actor.tensor_model_parallel_size)
    data_path = actor.data_path
    if isinstance(data_path, dict):
        data_path = {name: _training_set(entry, cfg) for name, entry in data_path.items()}
    return dataclasses.replace(actor, data_path=data_path, infer_tensor_parallel_size=infer_tp)


def _training_set(entry: schema.TrainingSet, cfg: Config) -> schema.TrainingSet:
    """What a set of a blend leaves out is as for the run."""
    prompt_type = _first_given(entry.prompt_type, cfg.training.prompt_type)
    return _with_scorers(dataclasses.replace(entry, prompt_type=prompt_type), cfg.algorithm)


def _pool(cfg: Config) -> schema.ResourcePool:
    """As many ranks as are asked for; colocated ones as the largest replica needs."""
    actor = cfg.actor_rollout
    pool = cfg.resource_pool
    train_tp = actor.tensor_model_parallel_size
    reference = cfg.ref.tensor_model_parallel_size * cfg.ref.pipeline_model_parallel_size
    if pool.colocate:
        generator = _first_given(actor.infer_tensor_parallel_size, train_tp)
        judge = cfg.reward.tensor_model_parallel_size * cfg.reward.pipeline_model_parallel_size
        ranks = max(train_tp * actor.pipeline_model_parallel_size, generator, reference, judge)
        ref = pool.ref
    else:
        ranks = actor.num_gpus_for_train + actor.num_gpus_for_infer
        ref = pool.ref or ([reference] if cfg.has_reference else [])
    return dataclasses.replace(pool, actor_rollout=pool.actor_rollout or [ranks], ref=ref)


def _first_given(value: Any, default: Any) -> Any:
    return default if value is None else value
