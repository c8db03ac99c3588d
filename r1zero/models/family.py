"""The seam for model families: what the program asks a family, and the table of those that it
knows.

A family is one file that answers four questions about a network: what its config.json means
(`ModelConfig`), which parameters it has and how tensor parallelism cuts them (`ParamSpec`), which
modules Megatron trains, and how the rollout engine computes one layer. Everything else (loading,
saving, publishing, the dry run, both engines) asks here, and never tests a family's name.

Needs no torch: checks of a configuration run without it. A family imports torch and Megatron where
it uses them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from r1zero.config.own_code import is_own, load_own, place_problems
from r1zero.errors import BadInput

if TYPE_CHECKING:
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import ModuleSpec

    from r1zero.models.config import ModelConfig
    from r1zero.models.params import ParamSpec

# Megatron has no name for a family; checkpoints and model files name it so where their other keys
# do not tell.
MODEL_TYPE = "hf_model_type"


class ModelFamily(ABC):
    """All that sets one family of models apart. Stateless: one object of each is registered."""

    name: ClassVar[str]  # transformers' model_type
    architectures: ClassVar[tuple[str, ...]]  # that config.json may name
    # Keys of `to_megatron` that a checkpoint's arguments must agree with, else its weights would be
    # misread.
    checked_arguments: ClassVar[tuple[str, ...]]

    @abstractmethod
    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """Read the content of a config.json.

        KeyError when a key is missing, BadInput for a value that cannot be or is not computed
        exactly here.
        """

    @abstractmethod
    def from_megatron(self, keys: Mapping[str, Any]) -> ModelConfig:
        """Read Megatron's names, of a model file or a checkpoint. Raises KeyError or BadInput."""

    @abstractmethod
    def to_megatron(self, config: ModelConfig) -> dict[str, Any]:
        """Say the same in Megatron's names."""

    def in_own_words(self, config: ModelConfig, keys: Mapping[str, Any]) -> dict[str, Any]:
        """A model file's keys as `to_megatron` says them, where Megatron has several ways."""
        return dict(keys)

    def matches_megatron(self, keys: Mapping[str, Any]) -> bool:
        """Whether these keys, which name no family, can only be of this one."""
        return False

    @abstractmethod
    def params(self, config: ModelConfig) -> list[ParamSpec]:
        """List every parameter of the model once, in a fixed order, the embedding first."""

    @abstractmethod
    def cut_sizes(self, config: ModelConfig) -> dict[str, int]:
        """What tensor parallelism cuts, by Megatron's names: a TP size must divide each."""

    @abstractmethod
    def activation_elements(
        self, config: ModelConfig, layer: int, tp: int, sequence_parallel: bool
    ) -> float:
        """Elements that a TP rank keeps of one token for the backward pass of one layer."""

    @abstractmethod
    def kv_cache_elements(self, config: ModelConfig, tp: int) -> float:
        """Elements of one token in the KV cache of a TP rank, all layers together."""

    @abstractmethod
    def gathered_elements(self, config: ModelConfig, tp: int) -> float:
        """Elements of one token that a TP rank gathers in a layer under context parallelism."""

    def transformer_options(self, config: ModelConfig) -> dict[str, Any]:
        """Fields of Megatron's TransformerConfig that differ from those of a dense model."""
        return {}

    @abstractmethod
    def layer_spec(
        self, config: ModelConfig, layer: int, groups: ProcessGroupCollection
    ) -> ModuleSpec:
        """Megatron's spec of one layer. Its parameters must have the names and shapes of
        `params`."""

    @abstractmethod
    def decoder_block(self, config: ModelConfig, layer: int, weights: LayerWeights) -> DecoderBlock:
        """One layer of the rollout engine, over the weights that publishing writes into."""


class LayerWeights(Protocol):
    """This rollout rank's weights of one layer. Names are Megatron's, without
    `decoder.layers.N.`."""

    def tensor(self, name: str) -> torch.Tensor:
        """The weight of this name."""

    def linear(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """x -> x W^T + b by the weight `name`.weight and, if there is one, `name`.bias."""

    def up_projection(self, name: str) -> UpProjection:
        """The same, of latents to keys and values."""

    def router(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """x [T, H] -> scores [T, experts] by the weight of this name, multiplied in fp32."""

    def experts(self, name: str) -> LocalExperts:
        """This rank's experts, of the weights `name`.linear_fc1.weight and
        `name`.linear_fc2.weight."""


@dataclass(frozen=True, slots=True)
class LocalExperts:
    """The experts of one layer that a rollout rank holds: E of them, from number `first` on."""

    gate_up: torch.Tensor  # [E, 2 F, H]
    down: torch.Tensor  # [E, H, F]
    first: int
    total: int  # of all ranks together


class DecoderOperators(Protocol):
    """What the rollout engine computes between matrix products: fused kernels where there are
    some."""

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add `delta` to `hidden` [T, H], if there is one: the RMSNorm of the sum, and the sum.

        Go on with the sum that is returned: `hidden` may or may not have become it.
        """

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """SwiGLU: [T, 2 F] -> silu(first half) * second half, [T, F]."""

    def experts(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        experts: LocalExperts,
    ) -> torch.Tensor:
        """What this rank's experts add to each token: x [T, H] -> [T, H].

        A token goes to the experts ids [T, k], int64, each of which counts with its weight [T, k],
        fp32; those of other ranks add nothing here.
        """


class Attend(Protocol):
    """RoPE, the KV cache and causal attention of one pass of the rollout engine."""

    def __call__(
        self,
        layer: int,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        /,
    ) -> torch.Tensor:
        """qkv [T, kv heads * (queries per group + 2) * D] -> [T, heads * D].

        `q_norm` and `k_norm` [D], if given, are the weights of an RMSNorm of each query and each
        key head.
        """


class UpProjection(Protocol):
    """The product that makes keys and values of latents: x [T, rank] -> [T, heads * (nope + value)],
    for each head its key's columns without a position, then its value."""

    @property
    def weight(self) -> torch.Tensor:
        """[heads * (nope + value), rank]."""

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """Multiply."""


class AttendLatent(Protocol):
    """The same of latent attention (`Latent`)."""

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        latent: torch.Tensor,
        key: torch.Tensor,
        up: UpProjection,
        /,
    ) -> torch.Tensor:
        """query [T, heads * (nope + rope)], latent [T, rank] behind its norm, and the key that all
        heads share, [T, rope] -> [T, heads * value].

        Query and key are not turned yet. The columns to turn are pairs that lie side by side, as in
        Hugging Face's files: (x0, x1), (x2, x3), ...
        """


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """What all blocks of one pass of the rollout engine share."""

    operators: DecoderOperators
    attend: Attend
    attend_latent: AttendLatent
    all_reduce: Callable[[torch.Tensor], torch.Tensor]  # sum over the TP ranks, in place
    # (number of the layer among those with experts, scores fp32 [T, experts]) -> the experts of each
    # token, int64 [T, k]: those with the highest scores, or those of an earlier pass
    choose_experts: Callable[[int, torch.Tensor], torch.Tensor]


class DecoderBlock(Protocol):
    """One layer of the rollout engine."""

    def __call__(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, run: ForwardPass
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run T tokens. `hidden` [T, H] is the residual stream, which the block may write into.

        `delta` is what the block before has left to be added to it, so that the addition can be
        one pass with the norm that follows. The block adds it, and returns the stream and what it
        leaves itself.
        """


# -- the table of families -----------------------------------------------------------------------

_FAMILIES: dict[str, ModelFamily] = {}  # by name, in the order of registration


def register(family: ModelFamily) -> None:
    """Make a family known; a later one of the same name replaces it."""
    _FAMILIES[family.name] = family


def register_own(key: str, names: Iterable[str]) -> None:
    """Make families of the user known, each written as module:class or path.py:class.

    BadInput, beginning with `key`, for what is none.
    """
    for name in names:
        if not is_own(name) or place_problems(name, "class"):
            [problem] = place_problems(name, "class")
            raise BadInput(f"{key}: {problem}")
        found = load_own(key, name, "class")
        if not issubclass(found, ModelFamily):
            raise BadInput(
                f"{key}: {name} is no model family; derive it from {ModelFamily.__name__}"
            )
        if missing := sorted(found.__abstractmethods__):
            raise BadInput(f"{key}: {name} does not say {', '.join(missing)}; define them")
        register(found())


def family_of(config: ModelConfig) -> ModelFamily:
    """The family of a model that has been read."""
    return _FAMILIES[config.family]


def by_architecture(architecture: object) -> ModelFamily:
    """The family whose models name this architecture in config.json. BadInput if there is none."""
    for family in _FAMILIES.values():
        if architecture in family.architectures:
            return family
    known = [name for family in _FAMILIES.values() for name in family.architectures]
    raise BadInput(
        f"architecture {architecture!r} is not supported; supported are {', '.join(known)}"
    )


def by_name(name: object) -> ModelFamily:
    """The family of this name, transformers' model_type. BadInput if there is none."""
    for family in _FAMILIES.values():
        if family.name == name:
            return family
    raise BadInput(f"model_type {name!r} is not supported; supported are {', '.join(_FAMILIES)}")


def by_megatron(keys: Mapping[str, Any]) -> ModelFamily:
    """The family of a model in Megatron's names: the one it names, else the one whose traits it
    has.
    """
    name = keys.get(MODEL_TYPE)
    for family in _FAMILIES.values():
        if family.name == name or (name is None and family.matches_megatron(keys)):
            return family
    known = ", ".join(_FAMILIES)
    raise BadInput(f"{MODEL_TYPE}: {name} is not supported; supported are {known}")
