"""The networks of a run: their shape, and what it demands of lengths, grids and the model file."""

from __future__ import annotations

import math
from operator import attrgetter

from r1zero.config.schema import Config
from r1zero.errors import BadInput, neighbours, shown
from r1zero.models.config import ModelConfig
from r1zero.models.family import MODEL_TYPE, family_of
from r1zero.models.lora import adapter_table, lora_config
from r1zero.models.params import num_elements
from r1zero.preflight.experts import check_policy_experts
from r1zero.preflight.found import Found, ModelFound


def check_models(found: Found) -> list[str]:
    """The networks against lengths, grids and model files; nothing when their shapes cannot be
    known here."""
    cfg = found.config
    policy = found.actor.shape
    models = [model for model in (found.actor, found.reference) if model is not None]
    problems = []
    for model in models:
        for sentence in _check_model_file(cfg, model):
            problems.append(sentence)
    if policy is not None:
        problems += _check_model_keys(cfg, found.actor, policy) + _check_positions(cfg, policy)
        for axis in ("tensor_model", "pipeline_model", "infer_tensor"):
            problems += _check_grid(cfg, f"actor_rollout.{axis}_parallel_size", policy)
        problems += check_policy_experts(cfg, policy)
        problems += _check_rank(cfg, policy)
    if found.reference is not None and found.reference.shape is not None:
        problems += _check_reference(cfg, found.reference, found.reference.shape, policy)
    return list(dict.fromkeys(problems))


def _check_reference(
    cfg: Config, model: ModelFound, reference: ModelConfig, policy: ModelConfig | None
) -> list[str]:
    """The reference by itself, and its vocabulary against the policy's."""
    problems = _check_model_keys(cfg, model, reference)
    for axis in ("tensor_model", "pipeline_model"):
        problems += _check_grid(cfg, f"ref.{axis}_parallel_size", reference)
    if policy is not None and policy.vocab_size != reference.vocab_size:
        problems.append(
            f"ref.load: {cfg.ref.load} has a vocabulary of {reference.vocab_size} rows, but "
            f"actor_rollout.load {cfg.actor_rollout.load} has {policy.vocab_size}"
        )
    elif policy not in (None, reference) and cfg.ref.reset_interval is not None:
        problems.append(
            f"ref.reset_interval: {cfg.ref.reset_interval} gives the reference the policy's weights, "
            f"but ref.load {cfg.ref.load} is another network than actor_rollout.load "
            f"{cfg.actor_rollout.load}; leave reset_interval out, or name the same network"
        )
    return problems


def _check_model_file(cfg: Config, model: ModelFound) -> list[str]:
    """A model file must describe a network by itself, where it has to stand in for the model
    folder.

    One that names its family there means to; another may say a few keys only.
    """
    name = attrgetter(f"{model.role}.model")(cfg)
    keys = cfg.model_keys(model.role)
    try:
        ModelConfig.from_megatron(keys)
    except KeyError as error:
        if MODEL_TYPE in keys and model.shape is None:
            return [
                f"model {name}: {error.args[0]} is missing, which {MODEL_TYPE} {keys[MODEL_TYPE]} "
                "needs; add it"
            ]
    except BadInput as error:
        return [f"model {name}: {error}"]
    return []


def _check_positions(cfg: Config, shape: ModelConfig) -> list[str]:
    limit = min(
        shape.max_positions,
        cfg.model_keys("actor_rollout").get("max_position_embeddings", math.inf),
    )
    if cfg.training.seq_length <= limit:
        return []
    return [
        f"training.seq_length: {cfg.training.seq_length} is more than the {limit} positions of "
        f"the model {cfg.actor_rollout.load}; {limit} is the most"
    ]


def _check_rank(cfg: Config, shape: ModelConfig) -> list[str]:
    """A product B A has no higher rank than the smaller side of the weight that it is added to.

    Experts have no adapters: theirs would be one of each, of another shape than all others.
    """
    lora = lora_config(cfg.actor_rollout)
    if lora is None:
        return []
    if shape.latent is not None:
        return [
            f"actor_rollout.lora.rank: {lora.rank} is not supported with the latent attention of "
            f"{cfg.actor_rollout.load}, whose projections have no adapters; set it to 0"
        ]
    adapters = adapter_table(shape, lora)
    if any(adapter.weight.cut == "experts" for adapter in adapters):
        return [
            f"actor_rollout.lora.targets: {list(lora.targets)} adapts the MLP, but that of the model "
            "has experts, which have no adapters; [qkv, proj] would work"
        ]
    sides = {}
    for adapter in adapters:
        columns = adapter.a.view[-1]
        rows = num_elements(adapter.b) // lora.rank
        sides[adapter.weight.name] = min(rows, columns)
    name = min(sides, key=sides.__getitem__)
    if lora.rank <= sides[name]:
        return []
    return [
        f"actor_rollout.lora.rank: {lora.rank} is more than {name} of the model can have; "
        f"{sides[name]} is the most, and 8 to 64 are usual"
    ]


def _check_grid(cfg: Config, key: str, shape: ModelConfig) -> list[str]:
    """A parallel size must divide what it cuts."""
    value = attrgetter(key)(cfg)
    if "pipeline" in key:
        role, _, _ = key.partition(".")
        listed = attrgetter(f"{role}.num_layer_list")(cfg)
        if listed is not None:
            return _check_stages(f"{role}.num_layer_list", listed, shape)
        cut = {"num_layers": shape.num_layers}
    else:
        cut = family_of(shape).cut_sizes(shape)
    uneven = [f"{name} {size}" for name, size in cut.items() if size % value]
    if not uneven:
        return []
    common = math.gcd(*cut.values())
    works = [number for number in range(1, common + 1) if common % number == 0]
    return [
        (
            f"{key}: {value} does not divide {', '.join(uneven)} of the model; "
            f"{neighbours(value, works)}"
        )
    ]


def _check_stages(key: str, listed: list[int], shape: ModelConfig) -> list[str]:
    """The layers of all pipeline stages are those of the model."""
    if sum(listed) == shape.num_layers:
        return []
    return [
        f"{key}: {listed} has {sum(listed)} layers, but the model has {shape.num_layers}; give each "
        "stage as many that they add up to that"
    ]


def _check_model_keys(cfg: Config, model: ModelFound, shape: ModelConfig) -> list[str]:
    """What the model file says about the network must agree with its config.json."""
    truth = shape.to_megatron()
    del truth["max_position_embeddings"]  # fewer may be asked for
    name = attrgetter(f"{model.role}.model")(cfg)
    given = cfg.model_keys(model.role)
    said = family_of(shape).in_own_words(shape, given)
    problems = [
        f"model {name}: {key}: {shown(value)} is not what {model.folder}/config.json says; "
        f"{shown(truth[key])} would work, or leave the key out"
        for key, value in given.items()
        if key in truth and said[key] != truth[key]
    ]
    positions = given.get("max_position_embeddings", 0)
    if positions > shape.max_positions:
        problems.append(
            f"model {name}: max_position_embeddings: {positions} is more than {model.folder}/config.json "
            f"says; {shape.max_positions} is the most"
        )
    return problems
