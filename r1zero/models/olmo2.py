"""OLMo 2: norms behind the attention and the MLP, and norms of all queries and all keys.

    h += norm(proj(attention(qkv(h))))       queries, keys: one norm over all their heads, then RoPE
    h += norm(down(silu(gate(h)) * up(h)))

"2 OLMo 2 Furious" (2025), section 3; transformers' Olmo2ForCausalLM. Beside the dense
block's table (params.py):

    Megatron                                               Hugging Face                cut by TP
    self_attention.q_layernorm.weight                 [Q]  q_norm                      rows
    self_attention.k_layernorm.weight                 [K]  k_norm                      rows
    self_attention.linear_proj.post_layernorm.weight  [H]  post_attention_layernorm    -
    mlp.linear_fc2.post_layernorm.weight              [H]  post_feedforward_layernorm  -

There is no norm before the attention or the MLP. Heads are cut by TP, so the mean square of all
queries is an all-reduce, of one number a token, and so is its gradient.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from r1zero.models.config import ModelConfig
from r1zero.models.dense import (
    NEUTRAL,
    DenseFamily,
    attention_output,
    fused_qkv,
    gated_mlp,
    layer_param,
)
from r1zero.models.family import DecoderBlock, ForwardPass, LayerWeights
from r1zero.models.params import ParamSpec

if TYPE_CHECKING:
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import ModuleSpec
    from torch.distributed import ProcessGroup

# Megatron's names of the norms, which the trainer's modules and the rollout's block share.
QUERY_NORM = "self_attention.q_layernorm.weight"
KEY_NORM = "self_attention.k_layernorm.weight"
ATTENTION_NORM = "self_attention.linear_proj.post_layernorm.weight"
MLP_NORM = "mlp.linear_fc2.post_layernorm.weight"


class Olmo2(DenseFamily):
    """transformers' Olmo2ForCausalLM."""

    name = "olmo2"
    architectures = ("Olmo2ForCausalLM",)
    neutral = NEUTRAL | {"attention_bias": False}
    kv_heads_may_be_missing = True
    qk_norm = True

    def layer_params(self, config: ModelConfig, layer: int) -> list[ParamSpec]:
        """One layer; the rows of the tables above and in params.py."""
        hidden = (config.hidden_size,)
        query = (config.num_heads * config.head_dim,)
        key = (config.num_kv_heads * config.head_dim,)
        return [
            fused_qkv(config, layer, "weight"),
            layer_param(layer, QUERY_NORM, "self_attn.q_norm.weight", query, 0),
            layer_param(layer, KEY_NORM, "self_attn.k_norm.weight", key, 0),
            attention_output(config, layer),
            layer_param(layer, ATTENTION_NORM, "post_attention_layernorm.weight", hidden, None),
            *gated_mlp(config, layer),
            layer_param(layer, MLP_NORM, "post_feedforward_layernorm.weight", hidden, None),
        ]

    def activation_elements(
        self, config: ModelConfig, layer: int, tp: int, sequence_parallel: bool
    ) -> float:
        """As the dense block's, and queries and keys once more, before their norm."""
        dense = super().activation_elements(config, layer, tp, sequence_parallel)
        return dense + (config.num_heads + config.num_kv_heads) * config.head_dim / tp

    def transformer_options(self, config: ModelConfig) -> dict[str, Any]:
        """Not told of the norms of queries and keys, Megatron does not sum their gradients over TP.

        It would do so for whole weights; each rank of ours has a part of its own.
        """
        return {"qk_layernorm": False}

    def layer_spec(
        self, config: ModelConfig, layer: int, groups: ProcessGroupCollection
    ) -> ModuleSpec:
        """The dense block's spec without its norms; norms behind both output projections."""
        from megatron.core.transformer.identity_op import IdentityOp
        from megatron.core.transformer.spec_utils import ModuleSpec

        norm = _all_heads_norm()
        projection = _normed_projection()
        spec = super().layer_spec(config, layer, groups)
        spec.submodules.input_layernorm = IdentityOp
        spec.submodules.pre_mlp_layernorm = IdentityOp
        attention = spec.submodules.self_attention.submodules
        query = {"num_heads": config.num_heads, "group": groups.tp}
        key = {"num_heads": config.num_kv_heads, "group": groups.tp}
        attention.q_layernorm = ModuleSpec(module=norm, params=query)
        attention.k_layernorm = ModuleSpec(module=norm, params=key)
        attention.linear_proj = projection
        spec.submodules.mlp.submodules.linear_fc2 = projection
        return spec

    def decoder_block(self, config: ModelConfig, layer: int, weights: LayerWeights) -> DecoderBlock:
        """One layer of the rollout engine."""
        return Olmo2Block(config, layer, weights)


# Modules of Megatron's layer spec. Functions make them, since their base classes need Megatron.


@functools.cache
def _all_heads_norm() -> type[torch.nn.Module]:
    """The norm of all queries, or of all keys."""
    import torch
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
    )
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    class AllHeadsNorm(torch.nn.Module):
        """RMSNorm over the heads of all TP ranks together, each of which has its part of the
        weight.
        """

        def __init__(
            self,
            config: TransformerConfig,
            hidden_size: int,
            eps: float,
            num_heads: int,
            group: ProcessGroup,
        ) -> None:
            """`hidden_size` is that of a head, as Megatron has it; `num_heads` are of all ranks."""
            super().__init__()
            self.eps = eps
            self.width = num_heads * hidden_size
            self.group = group
            self.weight = torch.nn.Parameter(
                torch.ones(
                    self.width // group.size(),
                    dtype=config.params_dtype,
                    device=torch.cuda.current_device(),
                )
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Normalise x [tokens, 1, heads of this rank, D], in fp32."""
            flat = x.flatten(-2).float()
            total = flat.square().sum(-1, keepdim=True)
            # The sum of all ranks; and, as each rank's output depends on it, so is its gradient.
            total = reduce_from_tensor_model_parallel_region(total, group=self.group)
            total = copy_to_tensor_model_parallel_region(total, group=self.group)
            scaled = flat * torch.rsqrt(total / self.width + self.eps)
            return (scaled * self.weight).to(x.dtype).view_as(x)

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
        ) -> ShardedStateDict:
            """Say to Megatron's checkpoints that the weight is cut by TP."""
            assert metadata is not None
            return make_sharded_tensors_for_checkpoint(
                self.state_dict(keep_vars=True),
                prefix,
                {"weight": 0},
                sharded_offsets,
                tp_group=self.group,
                dp_cp_group=metadata["dp_cp_group"],
            )

    return AllHeadsNorm


@functools.cache
def _normed_projection() -> type[torch.nn.Module]:
    """An output projection with a norm behind it."""
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    from r1zero.models.megatron_modules import RMSNorm

    class NormedProjection(RowParallelLinear):
        """An output projection whose result, summed over TP, is normalised."""

        def __init__(self, *sizes: int, config: TransformerConfig, **options: Any) -> None:
            super().__init__(*sizes, config=config, **options)
            self.post_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            """x [tokens, 1, in / TP] -> [tokens (/ TP under SP), 1, hidden]."""
            output, bias = super().forward(x)
            assert bias is None
            return self.post_layernorm(output), None

    return NormedProjection


class Olmo2Block:
    """OLMo 2's block in the rollout engine, with one more all-reduce, of two numbers a token."""

    def __init__(self, config: ModelConfig, layer: int, weights: LayerWeights) -> None:
        self.layer = layer
        self.config = config
        self.qkv = weights.linear("self_attention.linear_qkv")
        self.q_norm = weights.tensor(QUERY_NORM)
        self.k_norm = weights.tensor(KEY_NORM)
        self.proj = weights.linear("self_attention.linear_proj")
        self.attention_norm = weights.tensor(ATTENTION_NORM)
        self.gate_up = weights.linear("mlp.linear_fc1")
        self.down = weights.linear("mlp.linear_fc2")
        self.mlp_norm = weights.tensor(MLP_NORM)

    def __call__(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, run: ForwardPass
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Leave the MLP's normalised output [T, H] to be added by what follows."""
        norm = run.operators.add_norm
        if delta is not None:
            hidden += delta
        qkv = self._normalised(self.qkv(hidden), run)
        mixed = run.attend(self.layer, qkv, None, None)
        normed, _ = norm(run.all_reduce(self.proj(mixed)), None, self.attention_norm)
        hidden += normed
        output = self.down(run.operators.silu_mul(self.gate_up(hidden)))
        normed, _ = norm(run.all_reduce(output), None, self.mlp_norm)
        return hidden, normed

    def _normalised(self, qkv: torch.Tensor, run: ForwardPass) -> torch.Tensor:
        """Normalise the queries and keys of the product [T, kv heads * (per group + 2) * D] in
        place.
        """
        size = self.config.head_dim
        per_group = self.config.num_heads // self.config.num_kv_heads
        groups = qkv.view(len(qkv), -1, per_group + 2, size)  # of this rank: queries, key, value
        queries = groups[:, :, :per_group]
        keys = groups[:, :, per_group]
        squares = groups[:, :, :-1].float().square().sum(dim=(1, 3))  # [T, per group + 1]
        means = squares.new_empty(len(qkv), 2)  # this rank's part of them
        means[:, 0] = squares[:, :per_group].sum(1) / (self.config.num_heads * size)
        means[:, 1] = squares[:, per_group] / (self.config.num_kv_heads * size)
        scales = (run.all_reduce(means) + self.config.norm_eps).rsqrt()[:, :, None, None]
        query_norm = self.q_norm.view(1, -1, per_group, size)
        key_norm = self.k_norm.view(1, -1, size)
        queries.copy_(queries * scales[:, 0:1] * query_norm)
        keys.copy_(keys * scales[:, 1] * key_norm)
        return qkv
