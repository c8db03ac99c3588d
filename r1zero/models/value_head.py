"""Reward models: which head stands in the place of the output layer, by config.json.

    architectures                    head                                a value is of
    ...ForSequenceClassification     Linear(H, 1)                        a response
    RewardModel (OpenRLHF)           the same                            a response
    ...ForRewardModel                Linear(H, H), ReLU, Linear(H, 1)    a response
    ...ForProcessRewardModel         Linear(H, H), ReLU, Linear(H, 2)    each step of one

The rest is the model that the architecture is named after. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1zero.config.parse import read_json
from r1zero.errors import BadInput
from r1zero.models import hf_config
from r1zero.models.config import CONFIG, ModelConfig, ValueHead, naming, read_config_file
from r1zero.models.family import by_name

CLASSIFIER = "ForSequenceClassification"
OUTCOME = "ForRewardModel"
PROCESS = "ForProcessRewardModel"
OPENRLHF = "RewardModel"
CAUSAL = "ForCausalLM"
ENDINGS = (CLASSIFIER, OUTCOME, PROCESS)

DEFAULT_LABELS = 2  # of transformers, where config.json does not say
# What ends a step in Qwen2.5-Math-PRM; the id where the folder has no tokenizer that tells.
STEP = "<extra_0>"
STEP_ID = 151651


def is_reward_model(folder: str | Path) -> bool:
    """Whether config.json in a folder names an architecture with a value head. BadInput when it
    cannot be read."""
    named = str(hf_config.architecture(read_config_file(Path(folder) / CONFIG)))
    return named == OPENRLHF or named.endswith(ENDINGS)


def read_reward_config(folder: str | Path) -> ModelConfig:
    """Read `config.json` in the folder of a reward model.

    BadInput when it is missing, of a model that has no value head, or of one with another number of
    outputs than is computed here.
    """
    folder = Path(folder)
    path = folder / CONFIG
    config = read_config_file(path)
    with naming(path):
        head = _read_head(config)
        head = replace(head, mean=_number(config, "mean"), std=_number(config, "std"))
        backbone = ModelConfig.from_config({**config, "architectures": [_backbone(config)]})
    if head.outputs > 1:
        head = replace(head, step_token=_step_token(folder, backbone))
    return with_value_head(backbone, head)


def with_value_head(backbone: ModelConfig, head: ValueHead) -> ModelConfig:
    """The reward model that has this head on a model's layers."""
    return replace(backbone, value_head=head, tie_word_embeddings=False)


def classifier_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a reward model with one linear layer writes in place of a causal model's keys in
    config.json."""
    named = str(hf_config.architecture(config)).removesuffix(CAUSAL)
    return {
        "architectures": [named + CLASSIFIER],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }


def _read_head(config: Mapping[str, Any]) -> ValueHead:
    """The head that an architecture has. BadInput when it has none, or another number of labels."""
    named = str(hf_config.architecture(config))
    if named.endswith(PROCESS):
        return ValueHead(layers=2, outputs=2)
    if named.endswith(OUTCOME):
        return ValueHead(layers=2)
    if named == OPENRLHF:
        hf_config.refuse_others(config, {"value_head_prefix": "score"})
        return ValueHead()
    if named.endswith(CLASSIFIER):
        labels = _labels(config)
        if labels != 1:
            raise BadInput(
                f"num_labels: {labels} is not supported; a reward model has 1, whose score is the "
                "value: take one, or set id2label if the head has a single row"
            )
        return ValueHead()
    raise BadInput(
        f"architecture {named} has no value head, so it is no reward model; supported are "
        f"{', '.join('...' + ending for ending in ENDINGS)} and {OPENRLHF}: name the folder of one"
    )


def _backbone(config: Mapping[str, Any]) -> str:
    """The causal model's architecture that a reward model has the layers of."""
    named = str(hf_config.architecture(config))
    if named == OPENRLHF:
        return by_name(config["model_type"]).architectures[0]
    for ending in (CLASSIFIER, PROCESS, OUTCOME):
        named = named.removesuffix(ending)
    return named + CAUSAL


def _labels(config: Mapping[str, Any]) -> int:
    """How many numbers the head gives; transformers writes their names."""
    names = config.get("id2label")
    if isinstance(names, dict):
        return len(names)
    if config.get("num_labels") is not None:
        return hf_config.count(config, "num_labels")
    return DEFAULT_LABELS


def _number(config: Mapping[str, Any], key: str) -> float | None:
    """A finite number; None when there is none. A spread is above 0."""
    if config.get(key) is None:
        return None
    if key == "std":
        return hf_config.positive(config, key)
    return hf_config.finite(config, key)


def _step_token(folder: Path, backbone: ModelConfig) -> int:
    """The id of the token that ends a step, by the folder's tokenizer. BadInput when the model has no
    row for it."""
    found = _added_tokens(folder).get(STEP, STEP_ID)
    if not isinstance(found, int) or not 0 <= found < backbone.vocab_size:
        raise BadInput(
            f"{folder / CONFIG}: vocab_size {backbone.vocab_size} has no place for {STEP}, the token "
            f"{found} that ends a step; put the model's own tokenizer files into the folder"
        )
    return found


def _added_tokens(folder: Path) -> dict[str, Any]:
    """Ids of the tokens that a tokenizer has beside its vocabulary; of none without its files."""
    found: dict[str, Any] = {}
    path = folder / "added_tokens.json"
    try:
        if path.is_file():
            found |= read_json(path)
        path = folder / "tokenizer.json"
        if path.is_file():
            for token in read_json(path).get("added_tokens") or []:
                found[token["content"]] = token["id"]
    except (AttributeError, KeyError, TypeError):  # not of this form
        raise BadInput(f"{path} is no file of a tokenizer: damaged; copy it again") from None
    return found
