"""What this machine has for a configuration, looked at once: its models and the place of each rank.

The checks and the dry run ask here and read nothing again; a run is made of it (run.py). A laptop
need not have the models of a cluster, so much may be missing here that a run must have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

from r1zero.config.rules import check_pool
from r1zero.config.schema import Config, filled, nodes, placement, role_sizes
from r1zero.distributed.placement import Placement
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.dtype import Dtype
from r1zero.models.value_head import read_reward_config
from r1zero.preflight.experts import EP_KEYS, check_dealing, check_sharing
from r1zero.weights.detect import config_folder

SIZES = (
    "training.context_parallel_size",
    "actor_rollout.tensor_model_parallel_size",
    "actor_rollout.pipeline_model_parallel_size",
    "actor_rollout.expert_model_parallel_size",
    "actor_rollout.infer_tensor_parallel_size",
    "actor_rollout.infer_expert_parallel_size",
    "ref.tensor_model_parallel_size",
    "ref.pipeline_model_parallel_size",
    "ref.expert_model_parallel_size",
    "reward.tensor_model_parallel_size",
    "reward.pipeline_model_parallel_size",
)
STAGES = ("actor_rollout.num_layer_list", "ref.num_layer_list")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFound:
    """What is known of a role's model."""

    role: str  # section of the configuration: actor_rollout, ref or reward
    load: str  # its weights
    folder: Path  # whose config.json describes the network; it may be elsewhere
    shape: ModelConfig | None  # from config.json, else from the model file; None: neither tells
    problem: str | None  # why config.json describes no network


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What is known of a configuration in a world of so many ranks."""

    config: Config
    world_size: int
    node_of_rank: tuple[int, ...]
    placement: Placement | None  # None: the roles do not fit the world
    misplaced: tuple[str, ...]  # why, or why the nodes do not suit
    actor: ModelFound
    reference: ModelFound | None  # None: the run has none
    reward_model: ModelFound | None = None  # the same

    @property
    def reference_shape(self) -> ModelConfig | None:
        """None, too, when the run has no reference."""
        return None if self.reference is None else self.reference.shape

    @property
    def reward_shape(self) -> ModelConfig | None:
        """None, too, when the run has no reward model."""
        return None if self.reward_model is None else self.reward_model.shape


def dtype_of(cfg: Config) -> Dtype:
    """The dtype of the weights of a configuration, resolved."""
    return Dtype.of(filled(cfg.training.bf16))


def look(
    cfg: Config, world_size: int | None = None, node_of_rank: Sequence[int] | None = None
) -> Found:
    """Look at the models, and lay out a world: by default the one that the pool asks for, on nodes
    as `config.schema.nodes` takes them to be."""
    if world_size is None:
        world_size = cfg.world_size
    actor = _find_model(cfg, "actor_rollout")
    reference = _find_reference(cfg, actor)
    models = [model for model in (actor, reference) if model is not None]
    placed: Placement | None = None
    misplaced: list[str] = []
    if not check_pool(cfg, world_size):  # else that is said
        node_of_rank = node_of_rank or nodes(cfg, world_size)
        placed, misplaced = _place(cfg, models, world_size, node_of_rank)
    return Found(
        config=cfg,
        world_size=world_size,
        node_of_rank=tuple(node_of_rank or ()),
        placement=placed,
        misplaced=tuple(misplaced),
        actor=actor,
        reference=reference,
        reward_model=_find_model(cfg, "reward") if cfg.has_reward_model else None,
    )


def _find_model(cfg: Config, role: str) -> ModelFound:
    """Read the shape of a role's model from its folder, or take the model file's word for it."""
    load = attrgetter(f"{role}.load")(cfg) or ""
    folder = _config_folder(cfg, role, load)
    shape = None
    problem = None
    try:
        if load and folder.is_dir():
            shape = _read_shape(role, folder)
    except BadInput as error:
        problem = str(error)
    if shape is None and problem is None:
        with contextlib.suppress(KeyError, BadInput):  # KeyError: the model file says too little
            shape = ModelConfig.from_megatron(cfg.model_keys(role))  # else check_models says it
    return ModelFound(role=role, load=load, folder=folder, shape=shape, problem=problem)


def _config_folder(cfg: Config, role: str, load: str) -> Path:
    """Where config.json of a role's model is: beside the weights, else with its tokenizer."""
    tokenizer = cfg.training.tokenizer_name_or_path or ""
    if role == "reward":
        tokenizer = cfg.reward.tokenizer_name_or_path or load
    return config_folder(load, tokenizer)


def _read_shape(role: str, folder: Path) -> ModelConfig:
    """Read a model's config.json. BadInput when it describes none, or one for another role."""
    if role == "reward":
        return read_reward_config(folder)
    return ModelConfig.from_folder(folder)


def _find_reference(cfg: Config, actor: ModelFound) -> ModelFound | None:
    """The reference is the actor's own start, as a rule: its folder is not read again."""
    if not cfg.has_reference:
        return None
    if actor.folder.is_dir() and cfg.ref.load == cfg.actor_rollout.load:
        return replace(actor, role="ref")
    return _find_model(cfg, "ref")


def _place(
    cfg: Config, models: Sequence[ModelFound], world_size: int, node_of_rank: Sequence[int]
) -> tuple[Placement | None, list[str]]:
    """The roles' grids in the world, and a sentence for each reason why they or the nodes do not
    fit."""
    if world_size == 1:
        return _place_alone(cfg, models)
    if unequal := _check_dealing(cfg, models, world_size):
        return None, unequal
    try:
        placed = placement(cfg, world_size)
    except BadInput as error:
        return None, [f"resource_pool: {error}"]
    crossed = placed.nodes_crossed(list(node_of_rank))
    return placed, [f"resource_pool: {sentence}" for sentence in crossed]


def _check_dealing(cfg: Config, models: Sequence[ModelFound], world_size: int) -> list[str]:
    """The experts of each role against the ranks of its stages."""
    sizes = role_sizes(cfg)
    shapes = {model.role: model.shape for model in models}
    problems = []
    for key, (role, section) in EP_KEYS.items():
        if role not in sizes:
            continue
        size = sizes[role]
        ranks = world_size if cfg.resource_pool.colocate else size.ranks
        if ranks % (size.tp * size.cp * size.pp) == 0:  # else that is said
            whose = "of rollout" if role == "rollout" else "of a pipeline stage"
            asked = attrgetter(key)(cfg) or 1
            problems += check_dealing(key, asked, shapes[section], ranks // size.pp, whose)
    policy = shapes["actor_rollout"]
    if problems or (policy is not None and policy.experts is None):
        return problems
    return check_sharing(cfg, sizes["rollout"])


def _place_alone(cfg: Config, models: Sequence[ModelFound]) -> tuple[Placement | None, list[str]]:
    """The same in a world of one rank, which cuts no model."""
    ways = "set it to 1"
    if _fits_its_pool(cfg, models):
        ways = f"start {cfg.world_size} processes or set it to 1"
    wrong = [
        f"{key}: {attrgetter(key)(cfg)} must be 1 in a world of one rank; {ways}"
        for key in _of_roles(cfg, SIZES)
        if attrgetter(key)(cfg) not in (1, None)
    ]
    for key in _of_roles(cfg, STAGES):
        listed = attrgetter(key)(cfg)
        if listed is not None and len(listed) > 1:
            wrong.append(f"{key}: {listed} must be left out in a world of one rank")
    if wrong:
        return None, wrong
    return placement(cfg, 1), []


def _fits_its_pool(cfg: Config, models: Sequence[ModelFound]) -> bool:
    """Whether the world that the pool asks for, of more ranks than one, can be laid out."""
    size = cfg.world_size
    if size == 1 or check_pool(cfg, size):
        return False
    placed, _ = _place(cfg, models, size, nodes(cfg, size))
    return placed is not None


def _of_roles(cfg: Config, keys: Sequence[str]) -> list[str]:
    """Those keys whose role the run has."""
    has = {"ref": cfg.has_reference, "reward": cfg.has_reward_model}
    return [key for key in keys if has.get(key.partition(".")[0], True)]
