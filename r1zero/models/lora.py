"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): which a model has, and their shapes.

Beside a linear layer's weight W [out, in] learn A [rank, in] and B [out, rank]; the layer computes

    y = (W + alpha / rank * B A) x

Tensor parallelism cuts them as it cuts W: where W's rows are cut so are B's and A is whole, where
its columns are cut so are A's and B is whole. So each rank can merge what it holds of W with what it
holds of A and B, and needs nothing of the others.

A fused layer has one A, and a B whose rows lie as those of the fused weight: queries, keys and values
by group of heads, gate above up. In Hugging Face's names that is an adapter for each of them, which
share A.

Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from r1zero.config.schema import ActorRollout
from r1zero.models.config import ModelConfig
from r1zero.models.params import ParamSpec, num_elements, param_table

# Endings of the parameters in Megatron, and of their tensors in a PEFT folder.
A_NAME = "adapter.a"
B_NAME = "adapter.b"
PEFT_A = "lora_A.weight"
PEFT_B = "lora_B.weight"
PEFT_PREFIX = "base_model.model."  # before Hugging Face's names
WEIGHT = "weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """The adapters of a run."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # some of schema.LINEARS

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / self.rank


def lora_config(actor: ActorRollout) -> LoraConfig | None:
    """What the keys below actor_rollout.lora say; None where all weights learn."""
    lora = actor.lora
    if not lora.rank:
        return None
    alpha = 2.0 * lora.rank if lora.alpha is None else lora.alpha
    return LoraConfig(rank=lora.rank, alpha=alpha, targets=tuple(lora.targets))


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """The adapter of one weight of the whole model."""

    weight: ParamSpec
    a: ParamSpec  # [rank, in]
    b: ParamSpec  # [out, rank]; of fused gate and up the view is [2, F, rank]

    @property
    def cuts_input(self) -> bool:
        """TP cuts the layer's input, and the sum of all ranks' products is its output."""
        return self.a.axis is not None

    @property
    def hf_modules(self) -> list[str]:
        """The Hugging Face layers that the weight is made of."""
        return [name.removesuffix(f".{WEIGHT}") for name in self.weight.hf]


def adapter_table(config: ModelConfig, lora: LoraConfig) -> list[AdapterSpec]:
    """List every adapter of the model once, in the order of the parameter table."""
    endings = tuple(f".linear_{target}.{WEIGHT}" for target in lora.targets)
    weights = [spec for spec in param_table(config) if spec.name.endswith(endings)]
    return [_adapter(spec, lora.rank) for spec in weights if spec.layer is not None]


def adapter_params(config: ModelConfig, lora: LoraConfig) -> list[ParamSpec]:
    """List A and B of every adapter."""
    return [spec for adapter in adapter_table(config, lora) for spec in (adapter.a, adapter.b)]


def trained_parameters(config: ModelConfig, lora: LoraConfig | None) -> int:
    """How many parameters of the whole model learn."""
    if lora is None:
        return config.num_parameters
    return sum(map(num_elements, adapter_params(config, lora)))


def _adapter(weight: ParamSpec, rank: int) -> AdapterSpec:
    """The adapter of a weight of so many rows and columns, cut as it is."""
    columns = len(weight.view) - 1
    cuts_input = weight.axis == columns
    stem = weight.name.removesuffix(WEIGHT)
    modules = [name.removesuffix(WEIGHT) for name in weight.hf]
    a = replace(
        weight,
        name=stem + A_NAME,
        hf=(f"{PEFT_PREFIX}{modules[0]}{PEFT_A}",),
        hf_shape=((rank, weight.view[-1]),),
        view=(rank, weight.view[-1]),
        axis=1 if cuts_input else None,
        kv_groups=None,
    )
    b = replace(
        weight,
        name=stem + B_NAME,
        hf=tuple(f"{PEFT_PREFIX}{module}{PEFT_B}" for module in modules),
        hf_shape=tuple((*shape[:-1], rank) for shape in weight.hf_shape),
        view=(*weight.view[:-1], rank),
        axis=None if cuts_input else weight.axis,
    )
    return AdapterSpec(weight, a, b)
