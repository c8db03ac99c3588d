"""Linear layers of the decoder, with weights laid out once per publish for the processor.

On a CPU oneDNN multiplies with its own blocked layout; handed a plain matrix it would reorder it at
every call. Elsewhere, and in bf16 on processors that oneDNN has no bf16 for, the plain weight is
used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Rows that the layout is chosen for: a decoding step of a few dozen samples.
TYPICAL_ROWS = 64


class Linear:
    """x -> x weight^T + bias. `prepare` must be called after the weight was written."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self._packed: torch.Tensor | None = None

    def prepare(self) -> None:
        """Lay the weight out anew."""
        if has_layout(self.weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, TYPICAL_ROWS)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [rows, in] -> [rows, out]."""
        if self._packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise.default(
            x, self._packed, self.bias, "none", [], ""
        )


class Router:
    """x -> scores x weight^T in fp32. `prepare` must be called after the weight was written."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self._wide = weight.float()  # the weight itself, if it is fp32

    def prepare(self) -> None:
        """Take the weight anew."""
        self._wide.copy_(self.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [rows, in] -> fp32 [rows, experts]."""
        return F.linear(x.float(), self._wide)


def has_layout(weight: torch.Tensor) -> bool:
    """Whether oneDNN is there and multiplies this type on this processor: bf16 needs AVX-512 or the
    like."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
