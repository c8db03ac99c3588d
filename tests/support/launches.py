"""Counts what PyTorch's dispatcher hands to a device: each operator that makes or writes memory there."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """`counted`: how often each operator was called within. A view is none, unless it had to
    copy; what the host computes is none."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        touched = _tensors(result) or _tensors(args)  # the latter where it writes into them
        on_device = any(tensor.device.type != "cpu" for tensor in touched)
        if on_device and not (function.is_view and _same_memory(touched[0], args[0])):
            self.counted[function.name()] += 1
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, tuple | list):
        return [value for value in values if isinstance(value, torch.Tensor)]
    return []


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
