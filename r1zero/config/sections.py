"""The sections of a configuration file: their names, the keys that each may have, and their shape.

Here the two roles, which stand under `actor_rollout_ref` in a file, are beside the others.
"""

from __future__ import annotations

from typing import Any

from r1zero.config import legacy, schema
from r1zero.config.parse import spelled
from r1zero.config.validate import field_names
from r1zero.errors import Diagnostics, nearest

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
NETWORK_KEYS = field_names(schema.Network)
# Keys that may stand in training, in a role or in a model file.
FREE_KEYS = (
    field_names(schema.Training)
    | field_names(schema.ActorRollout)
    | field_names(schema.Ref)
    | set(legacy.NO_EFFECT)
    | set(legacy.FIXED)
)


def known_keys(section: str) -> set[str]:
    """The keys that a section has of its own, today's and older ones."""
    own = field_names(SECTIONS[section])
    if section == "reward":
        return own | set(legacy.REWARD_SETTINGS)
    return own


def accepted_keys(section: str) -> set[str]:
    """The keys that may stand in a section: in most also those that roles share."""
    known = known_keys(section)
    if section in ("algorithm", "resource_pool"):
        return known
    return known | FREE_KEYS


def split(content: dict, notes: Diagnostics) -> dict[str, Any]:
    """Bring the roles to the top and check that sections are known mappings."""
    sections = {str(key).replace("-", "_"): value for key, value in content.items()}
    for key in sorted(set(sections) - set(TOP)):
        notes.refuse(
            f"{key} is not a section of the configuration{place_hint(key) or nearest(key, TOP)}"
        )
    sections = {key: sections[key] for key in TOP if sections.get(key) is not None}
    mappings = {key: sections.pop(key, {}) for key in (*SECTIONS, "actor_rollout_ref", "model")}
    if isinstance(mappings["actor_rollout_ref"], dict):
        roles = spelled(mappings.pop("actor_rollout_ref"))
        for key in sorted(set(roles) - {"actor_rollout", "ref"}):
            notes.refuse(
                f"actor_rollout_ref.{key} is unknown: it has the sections actor_rollout and ref"
            )
        for role in ("actor_rollout", "ref"):
            given = roles.get(role)
            mappings[role] = {} if given is None else given
    for key, mapping in mappings.items():
        if not isinstance(mapping, dict):
            notes.refuse(f"{key}: {mapping!r} must be a section with keys")
            mapping = {}
        sections[key] = mapping if key == "model" else spelled(mapping)
    return sections


def place_hint(key: str) -> str:
    """Say in which section a key belongs."""
    owners = [name for name, kind in SECTIONS.items() if key in field_names(kind)]
    return f"; did you mean {owners[0]}.{key}?" if owners else ""


def refuse_unknown(
    mapping: dict[str, Any], accepted: set[str], where: str, notes: Diagnostics
) -> None:
    """Refuse keys that nothing reads, and keys that say something else than what always holds."""
    for key, value in mapping.items():
        if key in NETWORK_KEYS - accepted:
            notes.refuse(
                f"{where}{key} describes the network: put it into a model file under configs/model/"
            )
        elif key not in accepted:
            notes.refuse(f"{where}{key} is unknown{nearest(key, accepted) or place_hint(key)}")
        elif key in legacy.FIXED and value is not None:
            values, reason = legacy.FIXED[key]
            if value not in values:
                notes.refuse(
                    f"{where}{key}: {value!r} is not supported, only {values[0]!r}: {reason}"
                )
