"""Counts what PyTorch's dispatcher hands to a device: each operator that makes or writes memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """`counted`: how often each operator was called within. A view is none, unless it had to
    copy."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not (function.is_view and _same_memory(result, args[0])):
            self.counted[function.name()] += 1
        return result


def _same_memory(result: Any, source: torch.Tensor) -> bool:
    first = result if isinstance(result, torch.Tensor) else result[0]
    return first.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
