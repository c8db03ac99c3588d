"""fp32 parameters of a model of another type, as they travel: their bits, as numbers of that type.

A bucket has one type, and a publication must not round what stays in fp32: a bias of DeepSeek-V3's
routers decides between experts in its last bits. So of a bf16 model its E numbers go as 2 E, which
nobody reads as numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from r1zero.models.params import ParamSpec


def as_bits(param: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bits of an fp32 parameter as numbers of `dtype`, in place; another one as it is.

    >>> as_bits(torch.tensor([1.0, -2.0]), torch.bfloat16).shape
    torch.Size([4])
    """
    if param.dtype == dtype:
        return param
    return param.detach().view(dtype)


def all_as_bits(
    tensors: Mapping[str, torch.Tensor], table: Sequence[ParamSpec], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors by name, those of fp32 parameters as bits, in Megatron's names and in Hugging
    Face's."""
    found = dict(tensors)
    for spec in table:
        if spec.fp32:
            for name in (spec.name, *spec.hf):
                if name in found:
                    found[name] = as_bits(found[name], dtype)
    return found


def table_in_bits(table: Sequence[ParamSpec], dtype: torch.dtype) -> list[ParamSpec]:
    """The parameter table with fp32 parameters in the shape of their bits. They are vectors.

    >>> from r1zero.models.params import whole_param
    >>> bias = replace(whole_param("bias", "hf.bias", (8,), None), fp32=True)
    >>> [spec.view for spec in table_in_bits([bias], torch.bfloat16)]
    [(16,)]
    """
    ratio = torch.float32.itemsize // dtype.itemsize
    found = []
    for spec in table:
        if spec.fp32:
            [size] = spec.view
            view = (size * ratio,)
            spec = replace(spec, view=view, hf_shape=(view,))
        found.append(spec)
    return found
