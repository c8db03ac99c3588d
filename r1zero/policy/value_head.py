"""The value head of a reward model: what it computes from hidden states, in fp32."""

from __future__ import annotations

import torch
from torch.nn.utils import skip_init

from r1zero.models.config import ValueHead


def make_value_head(head: ValueHead, hidden: int, device: torch.device) -> torch.nn.Module:
    """From hidden states [R, H] to values [R, outputs], all fp32; its weights are to be loaded.

    Its parameters are named as in models/params.py, and whole on each rank that has it.
    """
    if head.layers == 1:
        return _linear(hidden, head.outputs, head.bias, device)
    return torch.nn.Sequential(
        _linear(hidden, hidden, True, device),
        torch.nn.ReLU(),
        _linear(hidden, head.outputs, True, device),
    )


def _linear(inputs: int, outputs: int, bias: bool, device: torch.device) -> torch.nn.Module:
    """One without values."""
    return skip_init(
        torch.nn.Linear, inputs, outputs, bias=bias, device=device, dtype=torch.float32
    )
