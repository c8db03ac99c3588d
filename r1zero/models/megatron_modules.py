"""Megatron modules that families put into their layer specs: RMSNorm and attention over packed
sequences.

The same modules, and so the same parameter names, on NPU, GPU and CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from r1zero.models.router_replay import RouterReplay
from r1zero.ops.attention import Segments, packed_causal_attention
from r1zero.ops.norm import rms_norm
from r1zero.ops.rotary import rotate_packed
from r1zero.ops.token_gather import gather_tokens


class RMSNorm(torch.nn.Module):
    """RMSNorm as Megatron builds norms.

    Under sequence parallelism each rank sees a part of the tokens, so the gradient must be summed
    over TP ranks: the flag on the weight asks for it.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of x [..., hidden]."""
        return rms_norm(x, self.weight, self.eps)


@dataclass
class PackedBatch(PackedSeqParams):
    """What Megatron hands down to every layer's attention: segments and rotary tables."""

    segments: Segments | None = None
    cos: torch.Tensor | None = None  # [T, 1, rotary_dim]
    sin: torch.Tensor | None = None
    # Ranks that share the tokens of a microbatch (context parallelism). Not Megatron's own cp_group,
    # which knows of no such ranks.
    token_group: dist.ProcessGroup | None = None
    # Routing replay (models/router_replay.py), of the tokens that this rank's routers see. None: they
    # choose themselves.
    routes: torch.Tensor | None = None  # uint8 [T / TP, layers with experts, experts per token]
    predictions: torch.Tensor | None = None  # int64 [T / TP], response tokens predicted from each


class BatchAttention(MegatronModule):
    """Attention that is handed the batch in every pass, and hands its routes on to the layer's
    router."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.router_replay: RouterReplay | None = None  # of the layer, if it has experts

    def take(self, batch: object) -> PackedBatch:
        """The batch that Megatron hands down."""
        assert isinstance(batch, PackedBatch), "the policy only runs packed batches"
        if self.router_replay is not None:
            self.router_replay.take(batch)
        return batch


class PackedAttention(BatchAttention):
    """Core attention over a packed batch, RoPE included; stands where Megatron puts its own.

    Responses of a group continue one shared prompt, so positions are not those that Megatron would
    count.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        packed_seq_params: PackedBatch | None = None,
        **_: object,
    ) -> torch.Tensor:
        """query [T, heads, D], key and value [T, kv heads, D] -> [T, heads * D]."""
        batch = self.take(packed_seq_params)
        assert batch.segments is not None and batch.cos is not None and batch.sin is not None
        query = rotate_packed(query, batch.cos, batch.sin)
        key = rotate_packed(key, batch.cos, batch.sin)
        key = gather_tokens(key, batch.token_group)
        value = gather_tokens(value, batch.token_group)
        output = packed_causal_attention(query, key, value, batch.segments, self.scale)
        return output.reshape(output.shape[0], -1)
