"""The dtype of weights, bfloat16 or float32, by the names and sizes that others know. No torch."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from r1zero.models.sizes import MOMENT_BYTES, OPTIMIZER_BYTES

if TYPE_CHECKING:
    import torch


class Dtype(Enum):
    """A dtype that models are trained in; the value is its short name."""

    BF16 = "bf16"
    FP32 = "fp32"

    @classmethod
    def of(cls, bf16: bool) -> Dtype:
        """The dtype that `training.bf16` means."""
        if bf16:
            return cls.BF16
        return cls.FP32

    @property
    def full_name(self) -> str:
        """What torch and config.json call it."""
        if self is Dtype.BF16:
            return "bfloat16"
        return "float32"

    @property
    def itemsize(self) -> int:
        """Bytes of a parameter."""
        if self is Dtype.BF16:
            return 2
        return 4

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of a parameter in the optimizer: fp32 moments, and beside bf16 an fp32 copy."""
        if self is Dtype.BF16:
            return OPTIMIZER_BYTES
        return MOMENT_BYTES

    @property
    def torch(self) -> torch.dtype:
        """The same in torch, which is imported for it."""
        import torch

        return getattr(torch, self.full_name)
