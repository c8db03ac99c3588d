"""Read a rank's shards out of a Hugging Face folder.

The safetensors files are mapped, and only the slices that a shard is made of are copied, by the table
in models/params.py.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.params import (
    EMBEDDING,
    FIRST,
    OUTPUT_LAYER,
    WHOLE,
    ParamSpec,
    ShardIndex,
    Shards,
    local_shape,
    param_table,
)
from r1zero.weights import fp8
from r1zero.weights.detect import WeightsOnDisk
from r1zero.weights.headers import (
    HEAD,
    StoredTensor,
    block_of,
    read_header,
    refuse_others,
    weight_files,
)
from r1zero.weights.source import Weights, refuse_untied

FLOATS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    fp8.FP8: torch.bfloat16,  # what such models are computed in
}


class Tensors:
    """The tensors of all files of a folder, by name; what is in fp8 is read in fp32 (fp8.py)."""

    def __init__(self, files: dict[str, safe_open], block: fp8.Block | None) -> None:
        self._files = files
        self._block = block

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def dtype(self, name: str) -> torch.dtype:
        """The type that its values are to be kept in."""
        return FLOATS[self._files[name].get_slice(name).get_dtype()]

    def slice_of(self, name: str) -> Any:
        """What reads its values, as `slice_of(name)[rows]` and `[rows, columns]`."""
        values = self._files[name].get_slice(name)
        if values.get_dtype() != fp8.FP8:
            return values
        assert self._block is not None, "else the folder was refused"
        scales = name + fp8.SUFFIX
        return fp8.BlockScaled(values, self._files[scales].get_slice(scales), self._block)


class HuggingFaceWeights(Weights):
    """The weights of a Hugging Face folder of safetensors files."""

    def __init__(self, found: WeightsOnDisk, shape: ModelConfig) -> None:
        """Open all files and check the whole model. BadInput listing what does not fit."""
        super().__init__(found, shape)
        self._tensors = _open(found, shape)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """As Weights.dtypes."""
        result: set[torch.dtype] = set()
        for tensor in param_table(self.shape):
            if tensor.fp32:
                continue
            for name in tensor.hf:
                result.add(self._tensors.dtype(name))
        return result

    def read(
        self, tensor: ParamSpec, index: ShardIndex = FIRST, shards: Shards = WHOLE
    ) -> torch.Tensor:
        """Read one rank's parameter only. BadInput if a tied model has another output layer."""
        if tensor.optional and tensor.hf[0] not in self._tensors:
            return torch.zeros(local_shape(tensor, shards))
        part = _read(self._tensors, tensor, index, shards)
        if (
            tensor.name in (EMBEDDING, OUTPUT_LAYER)
            and self.shape.tie_word_embeddings
            and HEAD in self._tensors
        ):
            first = index.of(tensor) * len(part)
            head = self._tensors.slice_of(HEAD)[first : first + len(part)]
            refuse_untied(self.found, part, head)
        return part


def _open(found: WeightsOnDisk, shape: ModelConfig) -> Tensors:
    """Open all files and look at their headers. BadInput listing what does not fit."""
    files: dict[str, safe_open] = {}
    stored: dict[str, StoredTensor] = {}
    for path in weight_files(found.folder):
        stored |= read_header(path)
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise BadInput(
                f"{path} cannot be read as safetensors ({error}); fetch the model again"
            ) from None
        files.update(dict.fromkeys(file.keys(), file))
    refuse_others(found.folder, stored, shape)
    return Tensors(files, block_of(found.folder))


def _read(tensors: Tensors, tensor: ParamSpec, index: ShardIndex, shards: Shards) -> torch.Tensor:
    """Build one rank's shard from slices of its sources, in the dtype of the file, fp8 in fp32."""
    local = local_shape(tensor, shards)
    if tensor.cut == "experts":
        names = expert_sources(tensor, index, shards)
        return torch.stack([tensors.slice_of(name)[:] for name in names]).view(local)
    sources = [tensors.slice_of(name) for name in tensor.hf]
    if tensor.axis is None:
        return sources[0][:].contiguous()
    if tensor.kv_groups is not None:
        return _read_qkv(sources, tensor, index.tp * local[0], (index.tp + 1) * local[0])
    size = tensor.view[tensor.axis] // shards.of(tensor)
    first = index.of(tensor) * size
    cut = slice(first, first + size)
    by_columns = len(sources) == 1 and tensor.axis == 1
    parts = [source[:, cut] if by_columns else source[cut] for source in sources]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous()


def expert_sources(tensor: ParamSpec, index: ShardIndex, shards: Shards) -> tuple[str, ...]:
    """Names of the matrices of a rank's own experts. Four experts, rank 1 of EP 2:

    >>> hf = ("gate 0", "up 0", "gate 1", "up 1", "gate 2", "up 2", "gate 3", "up 3")
    >>> fc1 = ParamSpec(
    ...     name="linear_fc1",
    ...     hf=hf,
    ...     hf_shape=((3, 2),) * 8,
    ...     view=(4, 2, 3, 2),
    ...     axis=0,
    ...     cut="experts",
    ...     layer=0,
    ...     place="layer",
    ... )
    >>> expert_sources(fc1, ShardIndex(ep=1), Shards(ep=2))
    ('gate 2', 'up 2', 'gate 3', 'up 3')
    """
    count = len(tensor.hf) // shards.of(tensor)
    first = index.of(tensor) * count
    return tensor.hf[first : first + count]


def _read_qkv(sources: list, tensor: ParamSpec, start: int, stop: int) -> torch.Tensor:
    """Return the rows start..stop of the fused projection, reading only the key-value groups they
    touch.

    Two groups of two query heads (each name stands for the rows of one head), rank 1 of TP 2:

        linear_qkv     q0 q1 k0 v0 | q2 q3 k1 v1       rows 4 to 7: group 1 alone
        read           q_proj  2 3    k_proj  1    v_proj  1
    """
    groups = tensor.kv_groups
    assert groups is not None, "only fused projections have groups"
    rows = tensor.view[0] // groups  # of one group: its queries, its key, its value
    first = start // rows
    last = -(-stop // rows)
    parts = []
    for source, size in zip(sources, tensor.hf_shape, strict=True):
        share = size[0] // groups
        parts.append(source[first * share : last * share].view(last - first, share, *size[1:]))
    fused = torch.cat(parts, dim=1).view(-1, *tensor.view[1:])
    return fused[start - first * rows : stop - first * rows].contiguous()
