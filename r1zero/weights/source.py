"""Weights on disk, whatever their format: checked whole when opened, then read tensor by tensor."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.family import family_of
from r1zero.models.layout import Box
from r1zero.models.params import (
    EMBEDDING,
    FIRST,
    OUTPUT_LAYER,
    WHOLE,
    ParamSpec,
    ShardIndex,
    Shards,
    local_shape,
    type_of,
)
from r1zero.weights.detect import WeightsOnDisk
from r1zero.weights.headers import refuse_misfits

log = logging.getLogger("r1zero")

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")
# rows: Megatron pads the vocabulary to a multiple of 128 times TP, which is at most 64
MOST_PADDING = 8192
# Megatron's fused layers name their norms after the projection that follows; its sharded names
# always do.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
# Those of latent attention, which are read so and never written.
FUSED_LATENT_NORMS = {
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}
SHARDED_EXPERTS = "experts.experts"


class Weights(ABC):
    """The weights of a whole model. Tensors are named as in models/params.py and come in Megatron's
    layout."""

    def __init__(self, found: WeightsOnDisk, shape: ModelConfig) -> None:
        self.found = found
        self.shape = shape

    @abstractmethod
    def read(
        self, tensor: ParamSpec, index: ShardIndex = FIRST, shards: Shards = WHOLE
    ) -> torch.Tensor:
        """Return one rank's parameter, contiguous, in the file's dtype. BadInput if it cannot be
        read.

        It may lie in a mapped file: use it up before the file changes, and write nothing into it.
        """

    @property
    @abstractmethod
    def dtypes(self) -> set[torch.dtype]:
        """The types of all tensors but those that are fp32 whatever the model has."""

    def stream(
        self, wanted: Iterable[ParamSpec], index: ShardIndex, shards: Shards, dtype: torch.dtype
    ) -> Iterator[tuple[ParamSpec, torch.Tensor]]:
        """Yield this rank's shard of each wanted tensor, in `dtype` but for those that are fp32 always,
        read when its turn comes.

        BadInput when a value is not finite in `dtype`: every later number would be NaN.
        """
        for tensor in wanted:
            part = self.read(tensor, index, shards).to(type_of(tensor, dtype))
            if not torch.isfinite(part.sum(dtype=torch.float32)):  # one pass, no copy
                raise BadInput(
                    f"{tensor.name} in {self.found.folder} holds values that are NaN or infinite "
                    f"in {str(dtype).removeprefix('torch.')}; take an earlier checkpoint, or "
                    "fetch the model again"
                )
            yield tensor, part


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A part of a tensor as it lies on disk."""

    box: Box  # the region that it fills
    load: Callable[[], torch.Tensor]  # read it, in the shape of the box


class MegatronWeights(Weights):
    """Weights in pieces as Megatron's ranks wrote them, cut or not."""

    @abstractmethod
    def pieces(self, tensor: ParamSpec) -> list[StoredPiece]:
        """List what is stored of a tensor; together the pieces cover it."""

    @abstractmethod
    def stores(self, name: str) -> bool:
        """Whether a tensor of this name is stored."""

    def read(
        self, tensor: ParamSpec, index: ShardIndex = FIRST, shards: Shards = WHOLE
    ) -> torch.Tensor:
        """Assemble one rank's parameter. BadInput when a tied model has another output layer."""
        if tensor.optional and not self.stores(tensor.name):
            return torch.zeros(local_shape(tensor, shards))
        tied = self.shape.tie_word_embeddings and tensor.name in (EMBEDDING, OUTPUT_LAYER)
        part = self._assemble(replace(tensor, name=EMBEDDING) if tied else tensor, index, shards)
        if tied and self.stores(OUTPUT_LAYER):
            head = self._assemble(replace(tensor, name=OUTPUT_LAYER), index, shards)
            refuse_untied(self.found, part, head)
        return part

    def _assemble(self, tensor: ParamSpec, index: ShardIndex, shards: Shards) -> torch.Tensor:
        """Put a rank's parameter together from the pieces that touch it.

        Columns of linear_proj that were stored at TP 2, for rank 1 of TP 3 (8 of 24 columns):

            stored    |-------- piece 0 --------|-------- piece 1 --------|     0:12    12:24
            wanted                      |---------------|                           8:16
            common                      |-------|-------|                     8:12    12:16
            in the piece, in the part                                8:12 -> 0:4,  0:4 -> 4:8
        """
        wanted = wanted_box(tensor, index, shards)
        shard = None
        for piece in self.pieces(tensor):
            common = tuple(
                slice(max(a.start, b.start), min(a.stop, b.stop))
                for a, b in zip(wanted, piece.box, strict=True)
            )
            if all(side.start < side.stop for side in common):
                part = piece.load()[_within(common, piece.box)]
                if common == wanted:  # nothing to put together: no copy, unless columns were cut
                    return part.contiguous().view(local_shape(tensor, shards))
                if shard is None:
                    shard = torch.empty(
                        [side.stop - side.start for side in wanted], dtype=part.dtype
                    )
                shard[_within(common, wanted)] = part
        assert shard is not None, f"{tensor.name} has no pieces"
        return shard.view(local_shape(tensor, shards))


def wanted_box(tensor: ParamSpec, index: ShardIndex, shards: Shards) -> Box:
    """The region of `tensor.view` that one rank holds.

    >>> from r1zero.models.params import whole_param
    >>> linear_proj = whole_param("linear_proj", "o_proj", view=(16, 24), axis=1)
    >>> wanted_box(linear_proj, ShardIndex(tp=1), Shards(tp=3))
    (slice(0, 16, None), slice(8, 16, None))
    """
    local_shape(tensor, shards)  # refuses parts that are not equal
    box = [slice(0, size) for size in tensor.view]
    if tensor.axis is not None:
        size = tensor.view[tensor.axis] // shards.of(tensor)
        first = index.of(tensor) * size
        box[tensor.axis] = slice(first, first + size)
    return tuple(box)


def canonical(name: str) -> str | None:
    """Name a stored model tensor as models/params.py does; None for what holds no weights.

    Megatron's sharded names of experts say "experts" twice.
    """
    if name.endswith(("_extra_state", ".inv_freq")) or "._extra_state/" in name:
        return None
    if name.startswith("mtp."):  # layers that predict further tokens
        return None
    name = name.removeprefix("module.").removeprefix("model.")
    name = name.replace(f".mlp.{SHARDED_EXPERTS}.", ".mlp.experts.")
    for fused, plain in (FUSED_NORMS | FUSED_LATENT_NORMS).items():
        if name.endswith(f".{fused}"):
            name = name.removesuffix(fused) + plain
    return name


def misfit(tensor: ParamSpec, found: tuple[int, ...], dtype: torch.dtype, tp: int = 1) -> list[str]:
    """Say how a stored whole tensor, or a shard of it, differs from what the model needs.

    Vocabularies may be padded.
    """
    if tensor.name in PADDED:
        rows = tensor.view[0]
    else:
        rows = 0
    if rows:
        expected = (-(-rows // tp), *tensor.view[1:])
    else:
        expected = local_shape(tensor, Shards(tp))
    padded = rows and found[1:] == expected[1:] and rows <= found[0] * tp <= rows + MOST_PADDING
    if found != expected and not padded:
        return [f"{tensor.name} has the shape {found} instead of {expected}"]
    if dtype in FLOATS:
        return []
    return [f"{tensor.name} has the type {dtype}, which is no float"]


def check_args(found: WeightsOnDisk, args: Namespace, shape: ModelConfig) -> None:
    """Compare the arguments that a checkpoint was made with. BadInput where its weights would be
    misread.

    A warning where they do not tell: converters leave the rotary base and the norm's epsilon at
    defaults.
    """
    given = vars(args)
    truth = shape.to_megatron()
    keys = list(family_of(shape).checked_arguments)
    if given.get("group_query_attention") and shape.latent is None:
        keys.append("num_query_groups")
    refuse_misfits(
        found.folder,
        [
            f"its arguments say {key} {given[key]} instead of {truth[key]}"
            for key in keys
            if given.get(key) not in (None, truth[key])
        ],
    )
    for key in "rotary_base", "norm_epsilon":
        if given.get(key) not in (None, truth[key]):
            log.warning(
                "%s: its arguments say %s %s; %s, as config.json says, is used",
                found.folder,
                key,
                given[key],
                truth[key],
            )


def refuse_untied(found: WeightsOnDisk, embedding: torch.Tensor, head: torch.Tensor) -> None:
    """BadInput for a separate output layer in a model that claims to have none: one would be
    lost."""
    if not torch.equal(embedding, head):
        raise BadInput(
            f"the weights in {found.folder} have an output layer (lm_head.weight) that differs "
            "from the embedding although config.json says tie_word_embeddings: true; set that to "
            "false, or drop the output layer"
        )


def _within(box: Box, outer: Box) -> Box:
    """Count a box from the corner of another one.

    >>> _within((slice(12, 16),), (slice(12, 24),))
    (slice(0, 4, None),)
    """
    return tuple(
        slice(a.start - b.start, a.stop - b.start) for a, b in zip(box, outer, strict=True)
    )
