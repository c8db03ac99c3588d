"""Presets: files of keys, such as those that a paper chose, below what a run says itself.

`configs/algorithm/NAME.yaml` is a preset. It is chosen under `defaults`, as `- algorithm: dapo`, or
on the command line, as `algorithm=dapo`; then it takes the place of the file's. What is said later
wins, key by key:

    preset of the file < the file < preset of the command line < overrides

Only a mapping that an override gives as a whole takes the place of all that is below it.
Sections here are those of sections.py: name -> keys, with the two roles beside the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1zero.config import legacy
from r1zero.config.overrides import Whole
from r1zero.config.parse import read_yaml
from r1zero.config.paths import expand
from r1zero.config.schema import ADVANTAGE, CONFIGS
from r1zero.config.sections import SECTIONS, accepted_keys, refuse_unknown, split
from r1zero.errors import Diagnostics, nearest

ALLOWED = ("training", "actor_rollout_ref", "reward", "algorithm", "resource_pool")
FOLDER = "algorithm"  # of the shipped ones, and of one's own beside a configuration
ROLES = ("actor_rollout", "ref")
Sections = Mapping[str, Mapping[str, Any]]

# A key in the upper layer, and those that it replaces in the lower one: they would beat it there.
REPLACED = {
    ("algorithm", "adv_estimator"): ("advantage",),
    ("algorithm", "advantage"): ("adv_estimator",),
    ("actor_rollout", "clip_ratio"): ("clip_ratio_low", "clip_ratio_high"),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """A key that chooses a function with settings beside it."""

    default: str
    older_key: str | None = None  # that chooses it where the key is not given
    older_names: Mapping[str, str] = field(default_factory=dict)  # of functions


CHOICES = {
    "loss": Choice("grpo"),
    "advantage": Choice(ADVANTAGE, "adv_estimator", legacy.ADVANTAGES),
}


@dataclass(frozen=True, slots=True)
class Preset:
    """A preset as it was read."""

    name: str  # as it was chosen
    path: Path
    sections: Sections


# -- files ----------------------------------------------------------------------------------------


def read_preset(name: str | None, beside: Path, notes: Diagnostics) -> Preset | None:
    """Read the preset `name`, a path or the name of a file. None if there is none.

    Mistakes are sentences in `notes`, and what is wrong is left out.
    """
    if name is None:
        return None
    path = _find(name, beside, notes)
    if path is None:
        return None
    content = {str(key).replace("-", "_"): value for key, value in read_yaml(path).items()}
    for section in sorted(set(content) - set(ALLOWED)):
        content.pop(section)
        notes.refuse(
            f"{path}: {section} has no place in a preset; its sections are {', '.join(ALLOWED)}"
        )
    sections = split(content, notes)
    kept = {}
    for section in SECTIONS:
        accepted = accepted_keys(section)
        refuse_unknown(sections[section], accepted, f"{path}: {section}.", notes)
        kept[section] = {key: value for key, value in sections[section].items() if key in accepted}
    return Preset(name, path, kept)


def _find(name: str, beside: Path, notes: Diagnostics) -> Path | None:
    """The file of a preset: a path, or a name in algorithm/ beside a configuration or in configs/."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        own = Path(expand(name))
        if own.is_file():
            return own
        notes.refuse(f"algorithm: there is no preset file {own}")
        return None
    folders = (beside / FOLDER, CONFIGS / FOLDER)
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    hint = nearest(name, known) or "; your own is a path, such as mine/dapo.yaml"
    notes.refuse(f"algorithm: there is no preset {name}, only {', '.join(known)}{hint}")
    return None


# -- layers ---------------------------------------------------------------------------------------


def lay_over(below: Sections, above: Sections) -> dict[str, dict[str, Any]]:
    """The keys of both; where both say something, what `above` says. Sections in them are joined."""
    joined = {}
    for section, keys in below.items():
        replaced = _replaced(section, keys, above)
        kept = {key: value for key, value in keys.items() if key not in replaced}
        if section == "algorithm" and isinstance(kept.get("loss_settings"), dict):
            kept["loss_settings"] = _without_bounds(kept["loss_settings"], above)
        joined[section] = _join(kept, above.get(section, {}))
    return joined


def _replaced(section: str, keys: Mapping[str, Any], above: Sections) -> set[str]:
    """The keys of a lower section that give way to other ones of the upper layer."""
    found: set[str] = set()
    if section in ROLES:
        found |= set(above.get("training", {}))  # what stands there holds for the roles, too
    for (owner, key), others in REPLACED.items():
        places = (owner, "training")
        if section in places and any(_says(above, place, key) for place in places):
            found |= set(others)
    if section == "algorithm":
        upper = above.get(section, {})
        found |= {f"{key}_settings" for key in CHOICES if _chooses_another(key, keys, upper)}
    return found


def _chooses_another(key: str, below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    """Whether the upper layer says another function than the lower one, whose settings then go."""
    upper = _chosen(key, above)
    if upper is None:
        return False
    lower = _chosen(key, below)
    return upper != (CHOICES[key].default if lower is None else lower)


def _chosen(key: str, keys: Mapping[str, Any]) -> Any:
    """The function that a layer chooses, by its name of today; None if it chooses none."""
    choice = CHOICES[key]
    name = keys.get(key)
    if name is None and choice.older_key is not None:
        name = keys.get(choice.older_key)
    if isinstance(name, str):
        return choice.older_names.get(name, name)
    return name


def _without_bounds(settings: Mapping[str, Any], above: Sections) -> dict[str, Any]:
    """The settings of a lower layer's loss without the bounds that the upper layer's gives by
    another key: they would beat it there."""
    if not _says(above, "algorithm", "loss"):
        return dict(settings)
    places = ("actor_rollout", "training")
    said = set()
    for setting, keys in legacy.LOSS_SETTINGS.items():
        if any(_says(above, place, key) for place in places for key in keys):
            said.add(setting)
    return {name: value for name, value in settings.items() if name not in said}


def _says(layer: Sections, section: str, key: str) -> bool:
    return layer.get(section, {}).get(key) is not None


def _join(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    joined = dict(below)
    for key, value in above.items():
        lower = joined.get(key)
        if not isinstance(value, dict):
            joined[key] = value
        elif isinstance(lower, dict) and not isinstance(value, Whole):
            joined[key] = _join(lower, value)
        else:
            joined[key] = _join({}, value)
    return joined


# -- what a preset did ----------------------------------------------------------------------------


def describe(preset: Preset, sections: Sections) -> str:
    """Say which keys of a preset hold in the joined sections, and which the run says otherwise."""
    taken = []
    otherwise = []
    for path, value in leaves(preset.sections):
        if _at(sections, path) == value:
            taken.append(".".join(path))
        else:
            otherwise.append(".".join(path))
    told = f"preset {preset.name} ({preset.path}) sets {', '.join(taken) or 'nothing'}"
    if otherwise:
        told += f"; the run says otherwise: {', '.join(otherwise)}"
    return told


def leaves(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple, Any]]:
    """Every value in nested sections, with its path."""
    for key, value in tree.items():
        path = (*above, str(key))
        if isinstance(value, dict) and value:
            yield from leaves(value, path)
        elif value != {}:
            yield path, value


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    """The value at a path; None where there is none."""
    for key in path:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree
