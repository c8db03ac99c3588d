"""ModelConfig: the sizes of a model, what placement, memory, weights and both engines need to know
of it.

Read from the `config.json` of a Hugging Face folder, so there is one source of truth; needs no
torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r1zero.config.parse import read_json
from r1zero.errors import BadInput
from r1zero.models import hf_config
from r1zero.models.family import by_architecture, by_megatron, family_of
from r1zero.models.hf_config import RopeScaling, YarnScaling
from r1zero.models.params import num_elements, param_table

__all__ = ["Experts", "Latent", "ModelConfig", "RopeScaling", "ValueHead", "YarnScaling"]

CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The routed experts of a mixture-of-experts model."""

    count: int  # of a layer
    top_k: int  # that each token goes to
    ffn_hidden_size: int  # of each
    layers: tuple[int, ...]  # that have them, ascending; the others have a dense MLP
    scores: Literal["softmax", "sigmoid"] = "softmax"  # what becomes of the router's product
    # Groups of experts that follow each other, and of how many of them a token's experts come.
    groups: int = 1
    top_k_groups: int = 1
    scale: float = 1.0  # of the sum of a token's experts
    shared_ffn_size: int = 0  # of the shared experts together, which compute every token

    @property
    def has_bias(self) -> bool:
        """Whether a bias of each expert, which is not trained, counts where experts are chosen."""
        return self.scores == "sigmoid"


# Of the norms of latents, whatever the other norms of a model have.
LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Keys and values of all heads are made of one latent vector of each token, and of one key with its
    position, which all heads share. A head's query and key have columns without a position, then
    those with it.
    """

    query_latent: int | None  # of the latent that queries are made of; None: of the hidden state
    rank: int  # of the latent of keys and values
    nope_dim: int  # columns of a query and a key without a position
    rope_dim: int  # those with it
    value_dim: int

    @property
    def query_dim(self) -> int:
        """Columns of a head's query, and of its key."""
        return self.nope_dim + self.rope_dim

    @property
    def cached_dim(self) -> int:
        """Columns that the cache has of a token: its latent, then its key with the position."""
        return self.rank + self.rope_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueHead:
    """What a reward model has in the place of the output layer: one or two linear layers on the
    hidden state behind the final norm, computed in fp32 (models/value_head.py).

    Two layers are Linear(H, H), ReLU, Linear(H, outputs), both with a bias.
    """

    layers: Literal[1, 2] = 1
    outputs: int = 1  # 2 of a process reward model: for and against a step
    # Of a single layer. Weights on disk that have none are read as 0, so one that is 0 may be left
    # out of what is written.
    bias: bool = True
    fp32: bool = True  # on disk as well; False: there it has the type of the model
    step_token: int | None = None  # that ends a step; None: the model values a whole response
    # Of the values over the model's training data, if its config.json tells (OpenRLHF).
    mean: float | None = None
    std: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder with grouped-query or latent attention, rotary positions, RMSNorm and a gated MLP.

    A family with sizes beyond these adds them in a subclass.
    """

    family: str  # its name, transformers' model_type
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # columns of a query and its key
    vocab_size: int  # rows of the embedding, padding included
    max_positions: int
    rope_theta: float
    rope_scaling: RopeScaling | YarnScaling | None
    norm_eps: float
    tie_word_embeddings: bool  # the output layer is the embedding
    qkv_bias: bool
    qk_norm: bool  # queries and keys are normalised, how is the family's
    experts: Experts | None = None  # None: all layers have a dense MLP
    latent: Latent | None = None  # None: grouped-query attention
    # Layers behind the last one in a folder, which predict further tokens and are not computed here.
    further_layers: int = 0
    # Of a reward model, which has no output layer: `tie_word_embeddings` is False there.
    value_head: ValueHead | None = None

    def __post_init__(self) -> None:
        assert self.value_head is None or not self.tie_word_embeddings, "nothing is tied"

    @property
    def may_have_spare_output_layer(self) -> bool:
        """Whether weights on disk may hold an output layer that is not read: a copy of the embedding,
        or the one that a reward model was made from."""
        return self.tie_word_embeddings or self.value_head is not None

    @property
    def rotary_dim(self) -> int:
        """Columns of a head that are turned by their position."""
        return self.latent.rope_dim if self.latent else self.head_dim

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied with before the softmax."""
        scale: float = self.head_dim**-0.5
        if isinstance(self.rope_scaling, YarnScaling):
            scale *= self.rope_scaling.score_scale
        return scale

    @property
    def qkv_size(self) -> int:
        """Rows of the fused projection: for each kv head its query heads, its key, its value."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters."""
        return sum(num_elements(spec) for spec in param_table(self))

    @property
    def num_active_parameters(self) -> int:
        """Those that compute a token: of each layer's experts only the chosen ones."""
        total = 0
        for spec in param_table(self):
            elements = num_elements(spec)
            if self.experts is not None and spec.cut == "experts":
                elements = elements * self.experts.top_k // self.experts.count
            total += elements
        return total

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `config.json` in `folder`. BadInput when it is missing or not a supported model."""
        path = Path(folder) / CONFIG
        config = read_config_file(path)
        with naming(path):
            return cls.from_config(config)

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


def read_config_file(path: Path) -> dict[str, Any]:
    """The content of a config.json. BadInput when it is missing or no object."""
    if not path.exists():
        raise BadInput(
            f"{path} does not exist: `load` must name a Hugging Face model folder "
            "with config.json and safetensors files"
        )
    config = read_json(path)
    if not isinstance(config, dict):
        raise BadInput(f"{path} must hold a JSON object")
    return config


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name in front of what is wrong in it: a missing key, or a value."""
    try:
        yield
    except KeyError as error:
        raise BadInput(f"{path} lacks the key {error}: is it a model's config.json?") from None
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
