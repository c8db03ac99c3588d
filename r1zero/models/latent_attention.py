"""LatentAttention: multi-head latent attention (MLA) of the trainer, over packed sequences.

    q = q_up(norm(q_down(x)))                  [heads, nope + rope]; without q_down where there is none
    latent, k_rope = kv_down(x)                [rank], [rope]
    k_nope, v = kv_up(norm(latent))            [heads, nope], [heads, value]
    k = k_nope of each head, then k_rope, which all heads share; RoPE turns the rope columns

DeepSeek-V2 (arXiv:2405.04434), section 2.1 and appendix C. The names of the parameters are
megatron-core's. Its own module counts positions along a sequence, where ours are those of the batch:
responses of a group continue one shared prompt.

What is small is whole on every TP rank: down projections, their norms, and the key k_rope. Up
projections are cut by heads. Under context parallelism the latents of all tokens are gathered, and
each rank expands them: 576 numbers a token, where keys and values of all heads have thousands.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig

from r1zero.models.config import LATENT_NORM_EPS, Latent
from r1zero.models.megatron_modules import BatchAttention, PackedBatch, RMSNorm
from r1zero.ops.attention import packed_causal_attention
from r1zero.ops.rotary import pairs_to_halves, rotate_packed
from r1zero.ops.token_gather import gather_tokens

# Turns the rope columns of heads, [T, heads, rope], by their positions.
Turn = Callable[[torch.Tensor], torch.Tensor]


class LatentAttention(BatchAttention):
    """Attention of one layer, projections included; stands where Megatron has its self-attention."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: object = None,
        layer_number: int = 1,
        *,
        latent: Latent,
        scale: float,
        pg_collection: ProcessGroupCollection,
        **_: object,
    ) -> None:
        """`scale` multiplies scores before their softmax."""
        super().__init__(config=config)
        self.layer_number = layer_number
        self.sizes = latent
        self.scale = scale
        self.tp = pg_collection.tp
        heads = config.num_attention_heads
        query = heads * latent.query_dim
        if latent.query_latent is None:
            self.linear_q_proj = self._cut_by_heads(config.hidden_size, query)
        else:
            self.linear_q_down_proj = WholeLinear(config, config.hidden_size, latent.query_latent)
            self.q_layernorm = RMSNorm(config, latent.query_latent, LATENT_NORM_EPS)
            self.linear_q_up_proj = self._cut_by_heads(latent.query_latent, query)
        self.linear_kv_down_proj = WholeLinear(config, config.hidden_size, latent.cached_dim)
        self.kv_layernorm = RMSNorm(config, latent.rank, LATENT_NORM_EPS)
        self.linear_kv_up_proj = self._cut_by_heads(
            latent.rank, heads * (latent.nope_dim + latent.value_dim), disable_grad_reduce=True
        )
        # Its input is gathered here, together with the shared key.
        self.linear_kv_up_proj.sequence_parallel = False
        self.linear_proj = RowParallelLinear(
            heads * latent.value_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tp,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: None = None,
        packed_seq_params: PackedBatch | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [T (/ TP under SP), 1, hidden] -> the same, and that there is no bias."""
        batch = self.take(packed_seq_params)
        assert batch.segments is not None and batch.cos is not None and batch.sin is not None
        turn = partial(_turned, cos=batch.cos, sin=batch.sin)
        query = self._queries(hidden_states, turn)
        latent, shared_key = self._latents(hidden_states, turn, batch.token_group)
        key, value = self._expand(latent, shared_key)
        mixed = packed_causal_attention(query, key, value, batch.segments, self.scale)
        return self.linear_proj(mixed.reshape(len(mixed), 1, -1))

    def _queries(self, x: torch.Tensor, turn: Turn) -> torch.Tensor:
        """The queries of this rank's heads, [T, heads / TP, nope + rope]."""
        if self.sizes.query_latent is None:
            query, _ = self.linear_q_proj(x)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(x)))
        query = query.view(len(query), -1, self.sizes.query_dim)
        plain, turning = query.split([self.sizes.nope_dim, self.sizes.rope_dim], dim=-1)
        return torch.cat([plain, turn(turning)], dim=-1)

    def _latents(
        self, x: torch.Tensor, turn: Turn, token_group: dist.ProcessGroup | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed latents [T, rank] and turned shared keys [T, 1, rope], those of the tokens of all
        context-parallel ranks.

        A rank computes heads of its own from them, so their gradients are summed over TP.
        """
        sizes = [self.sizes.rank, self.sizes.rope_dim]
        latent, key = self.linear_kv_down_proj(x).split(sizes, dim=-1)
        joined = torch.cat([self.kv_layernorm(latent), key], dim=-1)
        if self.config.sequence_parallel:
            joined = gather_from_sequence_parallel_region(joined, group=self.tp)
        else:
            joined = copy_to_tensor_model_parallel_region(joined, group=self.tp)
        latent, key = joined.split(sizes, dim=-1)
        joined = gather_tokens(torch.cat([latent, turn(key)], dim=-1), token_group)
        latent, key = joined.split(sizes, dim=-1)
        return latent, key

    def _expand(
        self, latent: torch.Tensor, shared_key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [T, heads / TP, nope + rope] and values [T, heads / TP, value]."""
        expanded, _ = self.linear_kv_up_proj(latent)
        sizes = [self.sizes.nope_dim, self.sizes.value_dim]
        expanded = expanded.view(len(expanded), -1, sum(sizes))
        key, value = expanded.split(sizes, dim=-1)
        shared = shared_key.expand(-1, key.shape[1], -1)
        return torch.cat([key, shared], dim=-1), value

    def _cut_by_heads(
        self, inputs: int, outputs: int, disable_grad_reduce: bool = False
    ) -> ColumnParallelLinear:
        """A projection of which each TP rank has the rows of its heads."""
        return ColumnParallelLinear(
            inputs,
            outputs,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=False,
            disable_grad_reduce=disable_grad_reduce,
            tp_group=self.tp,
        )


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Columns in pairs as halves, turned by their positions: x [T, heads, rope]."""
    return rotate_packed(pairs_to_halves(x), cos, sin)


class WholeLinear(torch.nn.Module):
    """x -> x weight^T, whole on every TP rank.

    Under sequence parallelism each rank sees a part of the tokens, so the gradient must be summed
    over TP ranks: the flag on the weight asks for it.
    """

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        empty = torch.empty(outputs, inputs, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(empty)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., inputs]."""
        return F.linear(x, self.weight)
