"""LoRA on the train ranks: adapters beside Megatron's linear layers, and the weights with them.

The base weights are frozen: they have neither gradients nor optimizer state. What TP cuts of an
adapter, and what has to be summed over its ranks (x input, y output, r this rank's part):

    layer            y_r                        summed over TP
    column parallel  W_r x + s B_r (A x)        forward nothing; the gradient of A x
    row parallel     sum of W_r x_r + s B (A_r x_r)   the layer's own sum has both; the gradient of B

With sequence parallelism a column-parallel layer has a part of the tokens, and gathers A x, which is
narrow, in place of x; then A's gradient is the sum over the parts.

What leaves the train ranks is merged (`MergedParameters`), so neither rollout engines nor
checksums know of adapters.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from torch.distributed import ProcessGroup

from r1zero.errors import BadInput
from r1zero.models.lora import AdapterSpec, LoraConfig, adapter_table
from r1zero.models.params import (
    ParamSpec,
    ShardIndex,
    Shards,
    local_shape,
    name_on_stage,
    shard,
    stage_of,
)
from r1zero.policy.megatron import RoleModel

# Megatron's name of a linear layer's product with its weight, before any sum over TP.
PRODUCT = "_forward_impl"


class Adapter(torch.nn.Module):
    """A and B of one linear layer, as this rank has them."""

    def __init__(
        self,
        spec: AdapterSpec,
        scale: float,
        group: ProcessGroup,
        sequence_parallel: bool,
        values: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """`group` has the TP ranks; `values` are this rank's A and B to begin with."""
        super().__init__()
        self.spec = spec
        self.scale = scale
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.enabled = True
        self.a = _parameter(values[0], spec.a)
        self.b = _parameter(values[1], spec.b)

    def attach(self, linear: torch.nn.Module) -> None:
        """Add this adapter's product to that of a Megatron linear layer, within the layer: a sum
        over TP, or a norm behind it, then sees both. BadInput when it is none."""
        if not hasattr(linear, PRODUCT):
            raise BadInput(
                f"actor_rollout.lora.targets: {self.spec.weight.name} is not of a linear layer of "
                "Megatron, which adapters need; leave its layer out"
            )
        linear.adapter = self
        setattr(linear, PRODUCT, partial(self.product, getattr(linear, PRODUCT)))

    def product(
        self, base: Callable[..., torch.Tensor], input: torch.Tensor, *args: Any, **options: Any
    ) -> torch.Tensor:
        """The layer's own product and the adapter's: [tokens, 1, out], as the layer has them."""
        output = base(input, *args, **options)
        if not self.enabled:
            return output
        return output + self(input)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """s B A x of the layer's input x [tokens, 1, in]."""
        a = self.a
        b = self.b
        if self.spec.cuts_input:
            b = copy_to_tensor_model_parallel_region(b, group=self.group)
            narrow = F.linear(x, a)
        elif self.sequence_parallel:
            a = copy_to_tensor_model_parallel_region(a, group=self.group)
            narrow = gather_from_sequence_parallel_region(
                F.linear(x, a), tensor_parallel_output_grad=True, group=self.group
            )
        else:
            narrow = copy_to_tensor_model_parallel_region(F.linear(x, a), group=self.group)
        return F.linear(self.scale * narrow, b)

    @torch.no_grad()
    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """This rank's W + s B A, computed in fp32, in the type of `weight`."""
        merged = torch.addmm(weight.float(), self.b.float(), self.a.float(), alpha=self.scale)
        return merged.to(weight.dtype)


class Adapters:
    """All adapters of this rank's stage of a model."""

    def __init__(self, model: RoleModel, config: LoraConfig, seed: int) -> None:
        """Freeze the model, whose weights are loaded, and put adapters beside its linear layers."""
        self.model = model
        self.config = config
        self.by_weight: dict[str, Adapter] = {}  # by the weight's name
        model.module.requires_grad_(False)
        for spec in adapter_table(model.shape, config):
            if stage_of(spec.weight, model.stages) != model.grid.stage:
                continue
            adapter = self._adapter(spec, seed)
            place = name_on_stage(spec.weight, model.stages).removesuffix(".weight")
            adapter.attach(model.module.get_submodule(place))
            self.by_weight[spec.weight.name] = adapter
        if model.config.recompute_granularity is not None and model.grid.is_first_stage:
            # A recomputed layer has a gradient only if its input has one.
            model.module.embedding.register_forward_hook(_with_gradient)

    def _adapter(self, spec: AdapterSpec, seed: int) -> Adapter:
        model = self.model
        full = initial_a(spec.a, seed)
        shards = Shards.of_grid(model.grid.span)
        a = shard(spec.a, full, ShardIndex(model.grid.tp_index, model.grid.expert_index), shards)
        b = torch.zeros(local_shape(spec.b, shards))
        values = (
            a.to(model.device.torch, model.dtype),
            b.to(model.device.torch, model.dtype),
        )
        return Adapter(
            spec, self.config.scale, model.groups.tp, model.config.sequence_parallel, values
        )

    def parameters(self) -> dict[str, torch.Tensor]:
        """This rank's A and B by their names."""
        named: dict[str, torch.Tensor] = {}
        for adapter in self.by_weight.values():
            named[adapter.spec.a.name] = adapter.a
            named[adapter.spec.b.name] = adapter.b
        return named

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model alone, for a moment."""
        for adapter in self.by_weight.values():
            adapter.enabled = False
        try:
            yield
        finally:
            for adapter in self.by_weight.values():
                adapter.enabled = True

    def merged(self) -> Mapping[str, torch.Tensor]:
        """This rank's parameters by name, as the rest of the world sees them."""
        return MergedParameters(self.model.parameters(), self.by_weight)

    def sharded_state(self) -> dict[str, ShardedTensor | ShardedTensorFactory]:
        """A and B by their names in the module, in place, and where they lie in the whole model."""
        state: dict[str, ShardedTensor | ShardedTensorFactory] = {}
        for adapter in self.by_weight.values():
            for spec, parameter in ((adapter.spec.a, adapter.a), (adapter.spec.b, adapter.b)):
                name = name_on_stage(spec, self.model.stages)
                state[name] = self._sharded(spec, parameter)
        return state

    def _sharded(
        self, spec: ParamSpec, parameter: torch.Tensor
    ) -> ShardedTensor | ShardedTensorFactory:
        grid = self.model.grid
        copy = grid.cp_index + grid.span.cp * grid.replica
        if spec.axis is None:
            replica = (0, grid.tp_index, copy)
            return ShardedTensor.from_rank_offsets(spec.name, parameter, replica_id=replica)
        tensor = ShardedTensor.from_rank_offsets(
            spec.name,
            parameter,
            (_cut_dim(spec, parameter), grid.tp_index, grid.span.tp),
            replica_id=(0, 0, copy),
        )
        if len(spec.view) > parameter.dim():  # gate above up
            return apply_swiglu_sharded_factory(tensor, ())
        return tensor


class MergedParameters(Mapping[str, torch.Tensor]):
    """Parameters by name, those with an adapter merged with it when they are asked for: never are
    all merged ones held at a time."""

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], by_weight: Mapping[str, Adapter]
    ) -> None:
        """`parameters` may have those of the adapters too; they are left out."""
        own = {id(value) for adapter in by_weight.values() for value in adapter.parameters()}
        self._base = {name: value for name, value in parameters.items() if id(value) not in own}
        self._by_weight = by_weight

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._base[name]
        if name in self._by_weight:
            return self._by_weight[name].merged(weight)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def initial_a(spec: ParamSpec, seed: int) -> torch.Tensor:
    """The whole A to begin with, fp32: uniform within 1 / sqrt(in), as Kaiming's initialisation with
    a = sqrt(5) has it. B begins at zero, so training begins at the base model.

    It depends on the seed and the name alone, so it is the same in every layout.
    """
    digest = hashlib.sha256(f"{seed} {spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    bound = 1 / sqrt(spec.view[-1])
    return torch.empty(spec.view).uniform_(-bound, bound, generator=generator)


def _parameter(values: torch.Tensor, spec: ParamSpec) -> torch.nn.Parameter:
    """A parameter that Megatron's gradient norm counts once over the TP ranks."""
    parameter = torch.nn.Parameter(values)
    if spec.axis is not None:
        set_tensor_model_parallel_attributes(parameter, True, _cut_dim(spec, parameter), 1)
    return parameter


def _cut_dim(spec: ParamSpec, parameter: torch.Tensor) -> int:
    """The dimension of a rank's matrix that TP cuts. The view of fused gate and up has one more."""
    assert spec.axis is not None
    return spec.axis - (len(spec.view) - parameter.dim())


def _with_gradient(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():
        output.requires_grad_()
    return output
