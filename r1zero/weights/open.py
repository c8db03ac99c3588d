"""Open the weights at a path, whatever kind they are of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.weights import legacy_files, torch_dist
from r1zero.weights.detect import WeightsOnDisk, detect
from r1zero.weights.huggingface import HuggingFaceWeights
from r1zero.weights.source import Weights

READERS: dict[str, Callable[[WeightsOnDisk, ModelConfig], Weights]] = {
    "hf": HuggingFaceWeights,
    "legacy": legacy_files.LegacyWeights,
    "torch_dist": torch_dist.DistWeights,
}


def open_weights(path: str | Path, shape: ModelConfig) -> Weights:
    """Detect what lies at `path` and check, from headers only, that it is this model, whole.

    BadInput for damaged or unsafe files, and for a list of missing, unexpected and misshaped
    tensors.
    """
    found = detect(path)
    return READERS[found.kind](found, shape)


def stored_shape(found: WeightsOnDisk) -> ModelConfig:
    """The shape of a Megatron checkpoint by its own arguments. BadInput when it does not tell."""
    args = (legacy_files if found.kind == "legacy" else torch_dist).read_args(found)
    try:
        if args is None:
            given = {}
        else:
            given = vars(args)
        return ModelConfig.from_megatron(
            {key: value for key, value in given.items() if value is not None}
        )
    except KeyError as error:
        raise BadInput(
            f"{found.folder} does not tell the model's {error.args[0]}; name a folder with its "
            "config.json"
        ) from None
