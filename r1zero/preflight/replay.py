"""Routing replay: whether a run does it, and what it needs (actor_rollout.routing_replay)."""

from __future__ import annotations

from r1zero.config.schema import Config
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.moe import MOST_EXPERTS
from r1zero.rollout.engines import ENGINES, choose_engine

KEY = "actor_rollout.routing_replay"


def replays_routes(cfg: Config, shape: ModelConfig | None) -> bool:
    """Routers of the trainer repeat what those of the rollout engine chose."""
    asked = cfg.actor_rollout.routing_replay
    if asked is False or shape is None:
        return False
    return not _obstacles(cfg, shape)


def route_bytes(cfg: Config, shape: ModelConfig) -> int:
    """Bytes of what is replayed of one token: an expert's id is one. 384 of Qwen3-30B-A3B."""
    if shape.experts is None or not replays_routes(cfg, shape):
        return 0
    return len(shape.experts.layers) * shape.experts.top_k


def check_replay(cfg: Config, shape: ModelConfig | None) -> list[str]:
    """Return a sentence if replay is asked for and cannot be."""
    if not cfg.actor_rollout.routing_replay or shape is None:
        return []
    return [f"{KEY}: true, but {obstacle}; leave it out" for obstacle in _obstacles(cfg, shape)]


def replay_line(cfg: Config, shape: ModelConfig | None) -> str:
    """Say whether the run replays routes; "" of a model without experts."""
    if shape is None or shape.experts is None:
        return ""
    if replays_routes(cfg, shape):
        return f"routing replay: on, {route_bytes(cfg, shape)} bytes a token"
    if cfg.actor_rollout.routing_replay is False:
        return f"routing replay: off, as {KEY} says"
    return f"routing replay: off: {_obstacles(cfg, shape)[0]}"


def replay_cautions(cfg: Config, shape: ModelConfig | None) -> list[str]:
    """A sentence if a model with experts learns without replay and nobody said that it should."""
    if shape is None or shape.experts is None or cfg.actor_rollout.routing_replay is not None:
        return []
    return [
        f"{KEY}: off, since {obstacle}: trainer and rollout engine may choose different experts for a "
        "token, and log-probs differ by more than rounding; set it to false if that is meant"
        for obstacle in _obstacles(cfg, shape)
    ]


def _obstacles(cfg: Config, shape: ModelConfig) -> list[str]:
    """What stands in the way of replay."""
    if shape.experts is None:
        return [f"the model {cfg.actor_rollout.load} has no experts"]
    if shape.experts.count > MOST_EXPERTS:
        return [
            f"the model {cfg.actor_rollout.load} has {shape.experts.count} experts in a layer, more "
            f"than {MOST_EXPERTS}"
        ]
    name = cfg.actor_rollout.engine
    if name not in ENGINES and not _records(name):
        return [f"the engine {name} does not tell which experts tokens go to"]
    return []


def _records(name: str) -> bool:
    """An engine of the user's says that it does by a class attribute."""
    try:
        return bool(getattr(choose_engine(name), "keeps_routes", False))
    except BadInput:
        return False  # which is said where engines are checked
