"""ModelConfig: the sizes of a model, what placement, memory, weights and both engines need to know
of it.

Read from the `config.json` of a Hugging Face folder, so there is one source of truth; needs no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1zero.config.parse import read_json
from r1zero.errors import BadInput
from r1zero.models import hf_config
from r1zero.models.family import by_architecture, by_megatron, family_of
from r1zero.models.hf_config import RopeScaling
from r1zero.models.params import num_elements

__all__ = ["Experts", "ModelConfig", "RopeScaling"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The routed experts of a mixture-of-experts model."""

    count: int  # of a layer
    top_k: int  # that each token goes to
    ffn_hidden_size: int  # of each
    layers: tuple[int, ...]  # that have them, ascending; the others have a dense MLP


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder with grouped-query attention, rotary positions, RMSNorm and a gated MLP.

    A family with sizes beyond these adds them in a subclass.
    """

    family: str  # its name, transformers' model_type
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # rows of the embedding, padding included
    max_positions: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    tie_word_embeddings: bool  # the output layer is the embedding
    qkv_bias: bool
    qk_norm: bool  # queries and keys are normalised, how is the family's
    experts: Experts | None = None  # None: all layers have a dense MLP

    @property
    def qkv_size(self) -> int:
        """Rows of the fused projection: for each kv head its query heads, its key, its value."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters."""
        return sum(num_elements(spec) for spec in family_of(self).params(self))

    @property
    def num_active_parameters(self) -> int:
        """Those that compute a token: of each layer's experts only the chosen ones."""
        total = 0
        for spec in family_of(self).params(self):
            elements = num_elements(spec)
            if self.experts is not None and spec.cut == "experts":
                elements = elements * self.experts.top_k // self.experts.count
            total += elements
        return total

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `config.json` in `folder`. BadInput when it is missing or not a supported model."""
        path = Path(folder) / "config.json"
        if not path.exists():
            raise BadInput(
                f"{path} does not exist: `load` must name a Hugging Face model folder "
                "with config.json and safetensors files"
            )
        config = read_json(path)
        if not isinstance(config, dict):
            raise BadInput(f"{path} must hold a JSON object")
        try:
            return cls.from_config(config)
        except KeyError as error:
            raise BadInput(f"{path} lacks the key {error}: is it a model's config.json?") from None
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Build from the content of a config.json. Raises KeyError or BadInput."""
        return by_architecture(hf_config.architecture(config)).read_config(config)

    @classmethod
    def from_megatron(cls, keys: Mapping[str, Any]) -> ModelConfig:
        """Read Megatron's names, of a model file's or a checkpoint's. Raises KeyError or
        BadInput."""
        return by_megatron(keys).from_megatron(keys)

    def to_megatron(self) -> dict[str, Any]:
        """Say the same in Megatron's names."""
        return family_of(self).to_megatron(self)
