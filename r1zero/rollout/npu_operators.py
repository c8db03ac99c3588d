"""Operators of the decoder by fused kernels of torch_npu (Ascend NPU): paged attention.

Checked against torch_npu's published contract, not yet run on hardware.
"""

from __future__ import annotations

import torch

from r1zero.ops import npu
from r1zero.rollout.block_attention import DecodeStep
from r1zero.rollout.operators import Operators


class NpuOperators(Operators):
    """One kernel reads the block table; what has no method here is PyTorch's."""

    def attend(
        self,
        step: DecodeStep,
        layer: int,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> torch.Tensor:
        """As Operators.attend."""
        query, keys, values = self.write_cache(step, layer, qkv, q_norm, k_norm)
        return npu.paged_attention(query, keys, values, step.layout.table, step.lengths)
