"""Weights in fp8 with a scale for each block, as DeepSeek-V3 and Qwen3's FP8 models are published.

config.json says so (hf_config.fp8_block). A matrix NAME of the type F8_E4M3 has NAME_scale_inv beside
it, F32, with a number for each block of 128 rows and 128 columns; the last blocks may be smaller.
Despite its name the number is a factor: weight = fp8 value x scale (README_WEIGHTS.md of DeepSeek-V3,
"Dequantization Method"). The products are made in fp32 here, so a weight is rounded once to fp32, and
once more where the model is kept in bf16. Nothing is computed in fp8.

What follows for safetensors' header, with the sizes of an expert of DeepSeek-V3:

    "model.layers.3.mlp.experts.0.gate_proj.weight": {"dtype": "F8_E4M3", "shape": [2048, 7168], ...}
    "model.layers.3.mlp.experts.0.gate_proj.weight_scale_inv": {"dtype": "F32", "shape": [16, 56], ...}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from r1zero.weights.headers import StoredTensor

FP8 = "F8_E4M3"  # safetensors' name
SUFFIX = "_scale_inv"
Block = tuple[int, int]  # rows, columns


def blocks_of(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """How many blocks a matrix has in each direction.

    >>> blocks_of((576, 7168), (128, 128))
    (5, 56)
    """
    return tuple(-(-size // side) for size, side in zip(shape, block, strict=True))


def is_scale(name: str, stored: Mapping[str, StoredTensor]) -> bool:
    """Whether a tensor holds the scales of a matrix that is there in fp8."""
    matrix = name.removesuffix(SUFFIX)
    return matrix != name and matrix in stored and stored[matrix].dtype == FP8


def misfits(name: str, stored: Mapping[str, StoredTensor], block: Block | None) -> Iterator[str]:
    """Why a matrix in fp8 cannot be read."""
    if block is None:
        yield f"{name} has the type {FP8}, and config.json has no quantization_config"
        return
    shape = stored[name].shape
    if len(shape) != 2:
        yield f"{name} has the type {FP8}, and the shape {shape} of no matrix"
        return
    scales = stored.get(name + SUFFIX)
    if scales is None:
        yield f"{name + SUFFIX} is missing"
    elif scales.dtype != "F32":
        yield f"{name + SUFFIX} has the type {scales.dtype} instead of F32"
    elif scales.shape != blocks_of(shape, block):
        expected = blocks_of(shape, block)
        yield f"{name + SUFFIX} has the shape {scales.shape} instead of {expected}"


class BlockScaled:
    """A matrix in fp8 that is read like a slice of safetensors: `matrix[rows]` and
    `matrix[rows, columns]` are its values in fp32, of which only those are read."""

    def __init__(self, values: Any, scales: Any, block: Block) -> None:
        """Both are slices of safetensors (`get_slice`)."""
        self._values = values
        self._scales = scales
        self._block = block

    def __getitem__(self, key: slice | tuple[slice, slice]) -> torch.Tensor:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        height, width = self._values.get_shape()
        top, bottom, _ = rows.indices(height)
        left, right, _ = columns.indices(width)
        values = self._values[top:bottom, left:right]
        scales = self._scales[
            top // self._block[0] : -(-bottom // self._block[0]),
            left // self._block[1] : -(-right // self._block[1]),
        ]
        scales = _spread(scales, 0, self._block[0], top, bottom)
        scales = _spread(scales, 1, self._block[1], left, right)
        return values.float() * scales


def _spread(scales: torch.Tensor, axis: int, side: int, start: int, stop: int) -> torch.Tensor:
    """A number for each of the places start..stop of an axis, from one for each block that they touch.

    Blocks of 4, places 3 to 9 of an axis: [a, b, c] -> [a, b, b, b, b, c]
    """
    repeated = scales.repeat_interleave(side, axis)
    return repeated.narrow(axis, start % side, stop - start)
