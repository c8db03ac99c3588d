"""How a value head is written into a Hugging Face folder.

Here a head is fp32 and, of one layer, has a bias, as Megatron's reward models have. transformers'
heads have the type of the model and, of one layer, no bias.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from r1zero.models.config import ModelConfig
from r1zero.models.params import FIRST, VALUE_HEAD, WHOLE, ParamSpec, param_table
from r1zero.weights.source import Weights


def as_written(weights: Weights, dtype: torch.dtype) -> ModelConfig:
    """The model as a Hugging Face folder of this type has it: as in transformers, unless the head
    would lose something by it.

    A bias that is not 0 is written as score.bias, which transformers leaves out with a warning: its
    values are then lower by that. Values that the type cannot hold stay in fp32.
    """
    shape = weights.shape
    if shape.value_head is None:
        return shape
    values: dict[str, torch.Tensor] = {}
    for spec in _head_params(shape):
        values[spec.name] = weights.read(spec, FIRST, WHOLE).float()
    bias = values.get(f"{VALUE_HEAD}.bias")
    head = replace(
        shape.value_head,
        bias=bias is not None and bool(bias.any()),
        fp32=any(not torch.equal(value, value.to(dtype).float()) for value in values.values()),
    )
    return replace(shape, value_head=head)


def _head_params(shape: ModelConfig) -> list[ParamSpec]:
    return [spec for spec in param_table(shape) if spec.name.startswith(VALUE_HEAD)]
