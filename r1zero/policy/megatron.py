"""The Megatron-core model of one role: a GPTModel that stops at the last hidden state.

The layers are the family's: megatron-core's local layer spec (no Transformer Engine), with a core
attention for packed sequences and an RMSNorm that knows sequence parallelism.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig, mlp
from megatron.core.transformer.moe import shared_experts
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from r1zero.algo.packing import Microbatch
from r1zero.distributed.device import Device
from r1zero.distributed.groups import Grid
from r1zero.models.config import ModelConfig
from r1zero.models.family import family_of
from r1zero.models.megatron_modules import BatchAttention, PackedBatch, RMSNorm
from r1zero.models.moe import BIAS
from r1zero.models.params import (
    WHOLE,
    ShardIndex,
    Shards,
    Stages,
    local_shape,
    stage_params,
)
from r1zero.models.rotary import rotary_tables
from r1zero.models.router_replay import RouterAgreement, RouterReplay
from r1zero.models.unused import local_columns
from r1zero.ops.swiglu import swiglu
from r1zero.policy.value_head import make_value_head
from r1zero.weights.open import open_weights
from r1zero.weights.source import Weights


class Backbone(GPTModel):
    """GPTModel whose last stage returns hidden states: log-probs never need all logits at once."""

    def _postprocess(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden_states

    def head_weight(self) -> torch.Tensor:
        """This rank's rows of the output layer [V / TP, hidden]; last stage only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def replace_output_layer(self, value_head: torch.nn.Module) -> None:
        """Let go of the output layer, which Megatron makes on every last stage, and have a value head
        in its place: a module by the name `rm_head`, as models/params.py calls it."""
        del self.output_layer
        self.rm_head = value_head


class RoleModel:
    """One copy of the model, cut over the ranks of a role."""

    def __init__(
        self,
        shape: ModelConfig,
        grid: Grid,
        device: Device,
        dtype: torch.dtype,
        max_positions: int,
        sequence_parallel: bool,
        recompute: bool,
        seed: int,
        unused: Sequence[range] = (),
    ) -> None:
        """Build this rank's part. `max_positions` bounds the tokens of one sequence, `unused` ids
        have no token."""
        assert grid.member
        self.shape = shape
        self.grid = grid
        self.device = device
        self.dtype = dtype
        rows = shape.vocab_size // grid.span.tp
        self.stages = Stages.of(shape.num_layers, grid.span)
        self.shards = Shards.of_grid(grid.span)
        self.unused = local_columns(unused, grid.tp_index * rows, rows)  # of this rank's logits
        self.groups = _collection(grid)
        if device.is_cpu:
            _fuse_swiglu()
        self.config = _transformer_config(shape, grid, device, dtype, sequence_parallel, recompute)
        with self.active():
            model_parallel_cuda_manual_seed(
                seed, tp_rank=grid.tp_index, ep_rank=grid.expert_index, etp_rank=0
            )
            self.module = Backbone(
                self.config,
                _layer_specs(shape, self.stages.layers(grid.stage), self.groups),
                shape.vocab_size,
                shape.max_positions,
                pre_process=grid.is_first_stage,
                post_process=grid.is_last_stage,
                share_embeddings_and_output_weights=shape.tie_word_embeddings,
                position_embedding_type="none",
                pg_collection=self.groups,
            )
        if shape.value_head is not None and grid.is_last_stage:
            head = make_value_head(shape.value_head, shape.hidden_size, device.torch)
            self.module.replace_output_layer(head)
        self._move_routers()
        self._mark_cut_parameters()
        self.router_agreement = RouterAgreement(device.torch)
        self._replay_routes()
        cos, sin = rotary_tables(shape, max_positions, device.torch)
        self._cos = cos.to(dtype)[:, None]
        self._sin = sin.to(dtype)[:, None]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Point the few globals that Megatron and MindSpeed still read at this role's groups.

        A rank may hold two roles with different layouts, so they are set for each use.
        """
        groups = {
            "_TENSOR_MODEL_PARALLEL_GROUP": self.groups.tp,
            "_PIPELINE_MODEL_PARALLEL_GROUP": self.groups.pp,
            "_DATA_PARALLEL_GROUP": self.groups.dp,
            "_DATA_PARALLEL_GROUP_WITH_CP": self.groups.dp_cp,
            "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": self.groups.tp_dp_cp,
            "_EXPERT_MODEL_PARALLEL_GROUP": self.groups.ep,
            "_EXPERT_TENSOR_PARALLEL_GROUP": self.groups.expt_tp,
            "_EXPERT_DATA_PARALLEL_GROUP": self.groups.expt_dp,
        }
        before = {name: vars(parallel_state)[name] for name in groups}
        vars(parallel_state).update(groups)
        if parallel_state._GLOBAL_MEMORY_BUFFER is None:
            parallel_state._set_global_memory_buffer()
        try:
            yield
        finally:
            vars(parallel_state).update(before)

    def parameters(self) -> dict[str, torch.Tensor]:
        """This rank's parameters by Megatron name with global layer numbers, those that are never
        trained included."""
        offset = self.stages.first_layer(self.grid.stage)
        named = {}
        found = dict(self.module.named_parameters())
        found |= {name: bias for name, bias in self.module.named_buffers() if name.endswith(BIAS)}
        for name, parameter in found.items():
            prefix, _, rest = name.partition("decoder.layers.")
            if rest:
                layer, _, tail = rest.partition(".")
                name = f"{prefix}decoder.layers.{int(layer) + offset}.{tail}"
            named[name] = parameter
        return named

    def _move_routers(self) -> None:
        """Megatron makes routers on the host. They become new parameters on the device, with the marks
        that Megatron gave them."""
        for module in self.module.modules():
            for name, host in module.named_parameters(recurse=False):
                if host.device.type == self.device.torch.type:
                    continue
                moved = torch.nn.Parameter(host.detach().to(self.device.torch))
                vars(moved).update(vars(host))
                setattr(module, name, moved)

    def _mark_cut_parameters(self) -> None:
        """Say which parameters are cut. Megatron does it while initialising at random, which
        loading leaves out; unmarked, the gradient norm would count one TP rank's shards only, and
        its experts, of which no rank has another's."""
        parameters = self.parameters()
        for tensor in stage_params(self.shape, self.grid.stage, self.stages):
            parameter = parameters[tensor.name]
            if tensor.axis is not None and not getattr(parameter, "tensor_model_parallel", False):
                whole = local_shape(tensor, WHOLE)
                part = local_shape(tensor, self.shards)
                dim = next((d for d in range(len(part)) if part[d] != whole[d]), 0)
                set_tensor_model_parallel_attributes(parameter, True, dim, 1)

    def _replay_routes(self) -> None:
        """Let routers choose the experts that a batch names, if it does."""
        experts = self.shape.experts
        if experts is None:
            return
        for layer in self.module.decoder.layers:
            number = layer.layer_number - 1  # Megatron counts from 1, over all stages
            if number not in experts.layers:
                continue
            replay = RouterReplay(experts.layers.index(number), self.router_agreement)
            layer.mlp.router.router_replay = replay
            for module in layer.self_attention.modules():
                if isinstance(module, BatchAttention):
                    module.router_replay = replay

    def load(self, path: str) -> None:
        """Fill the parameters from a Hugging Face folder or a Megatron checkpoint. BadInput if it
        does not fit."""
        self.fill(open_weights(path, self.shape))

    @torch.no_grad()
    def fill(self, weights: Weights) -> None:
        """Fill the parameters. BadInput when they cannot be read."""
        parameters = self.parameters()
        held = stage_params(self.shape, self.grid.stage, self.stages)
        index = ShardIndex(self.grid.tp_index, self.grid.expert_index)
        for tensor, shard in weights.stream(held, index, self.shards, self.dtype):
            parameters.pop(tensor.name).copy_(shard)
        assert not parameters, f"parameters without weights: {sorted(parameters)}"

    def hidden(self, batch: Microbatch, module: torch.nn.Module | None = None) -> torch.Tensor:
        """Run this stage on packed tokens. Returns [tokens (/ TP under SP), 1, hidden]."""
        packed = PackedBatch(
            qkv_format="thd",
            segments=batch.segments,
            cos=self._cos[batch.positions],
            sin=self._sin[batch.positions],
            token_group=self.grid.groups["cp"],
        )
        if batch.routes is not None:
            packed.routes = self._own_tokens(batch.routes)
            packed.predictions = self._own_tokens(batch.predictions())
        return (module or self.module)(
            batch.tokens[None], batch.positions[None], None, packed_seq_params=packed
        )

    def _own_tokens(self, per_token: torch.Tensor) -> torch.Tensor:
        """What a router on this rank sees of [T, ...]: under sequence parallelism a part."""
        if not self.config.sequence_parallel:
            return per_token
        return per_token.chunk(self.grid.span.tp)[self.grid.tp_index]

    def full_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """Make the last stage's output whole on every TP rank: [tokens, hidden], gradient summed
        over TP."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.groups.tp)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.groups.tp)
        return hidden[:, 0]


def _fuse_swiglu() -> None:
    """Let Megatron's gated MLPs call our SwiGLU on a CPU, as MindSpeed lets them call its own on NPUs."""

    def bias_swiglu(gate_up: torch.Tensor, bias: None, *_: object) -> torch.Tensor:
        assert bias is None, "no model has biases in its MLP"
        return swiglu(gate_up)

    mlp.bias_swiglu_impl = bias_swiglu
    shared_experts.bias_swiglu_impl = bias_swiglu


def _collection(grid: Grid) -> ProcessGroupCollection:
    """Name the role's groups as Megatron does; a role that does not learn has no groups over its
    replicas.

    Megatron does not know of context parallelism: its ranks are data-parallel ones to it, whose tokens
    add to one gradient. Experts are cut by EP only, never by TP.
    """
    alone = grid.groups["self"]
    tp = grid.groups["tp"]
    ep = grid.groups["ep"]
    dp = grid.groups.get("dp", alone)
    expt_dp = grid.groups["expt_dp"]
    everyone = grid.groups.get("all", alone)
    return ProcessGroupCollection(
        tp=tp,
        pp=grid.groups["pp"],
        mp=grid.groups.get("mp", alone),
        dp=dp,
        dp_cp=dp,
        tp_cp=tp,
        tp_dp_cp=grid.groups["tp_dp"],
        cp=alone,
        ep=ep,
        hcp=None,
        embd=grid.groups.get("embd"),
        pos_embd=alone if grid.is_first_stage else None,
        expt_tp=alone,
        tp_ep=ep,
        tp_ep_pp=grid.groups["tp_ep_pp"],
        expt_dp=expt_dp,
        intra_dp_cp=dp,
        intra_expt_dp=expt_dp,
        inter_dist_opt=None,
        intra_dist_opt=everyone,
    )


def _transformer_config(
    shape: ModelConfig,
    grid: Grid,
    device: Device,
    dtype: torch.dtype,
    sequence_parallel: bool,
    recompute: bool,
) -> TransformerConfig:
    span = grid.span
    options: dict[str, Any] = dict(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=shape.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=span.tp,
        pipeline_model_parallel_size=span.pp,
        sequence_parallel=sequence_parallel and span.tp > 1,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        # Packed microbatches differ in length; the dispatcher's name is what that flag asks of
        # dense models too.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # Our loss divides by the global token count itself; Megatron must not divide again.
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=device.is_cpu,
        bias_activation_fusion=True,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    if shape.experts is not None:
        options |= {"expert_model_parallel_size": span.ep, "expert_tensor_parallel_size": 1}
    if span.pp > 1 and span.num_layer_list:
        options["pipeline_model_parallel_layout"] = _stage_contents(span.num_layer_list)
    if recompute:
        options |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return TransformerConfig(**options | family_of(shape).transformer_options(shape))


def _stage_contents(num_layer_list: Sequence[int]) -> list[list[str]]:
    """What each pipeline stage holds, in Megatron's words.

    >>> _stage_contents((1, 2))
    [['embedding', 'decoder'], ['decoder', 'decoder', 'loss']]
    """
    contents = [["decoder"] * layers for layers in num_layer_list]
    contents[0].insert(0, "embedding")
    contents[-1].append("loss")
    return contents


def _layer_specs(
    shape: ModelConfig, layers: range, groups: ProcessGroupCollection
) -> TransformerBlockSubmodules:
    """The family's layers of this stage, and the final norm."""
    family = family_of(shape)
    specs = [family.layer_spec(shape, layer, groups) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)
