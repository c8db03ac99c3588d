"""Varlen flash attention over packed sequences: cu_seqlens, grouped queries, shared prefixes.

On an NPU by its fused kernel, on a CPU by attention_kernels.cpp where there is a C++ compiler, else
segment by segment with scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from r1zero.ops import attention_kernels, npu

# Queries times keys of a mask that a layer keeps for its backward pass. Larger ones are made in
# parts, and anew in the backward pass: of 4,000 queries with 32,000 keys a mask has 512 MB in fp32.
LARGEST_MASK = 2**22


@dataclass(frozen=True, slots=True)
class Segments:
    """Which tokens of a packed batch see which: each segment's queries see a prefix and, causally,
    themselves.

    Segment i holds the queries [cu_seqlens_q[i - 1], cu_seqlens_q[i]). Its keys are [cu_seqlens_k[i
    - 1], cu_seqlens_k[i]) of the tokens listed in `key_rows`: first the prefix, then the segment
    itself, so that the last query sees all of them. There may be more keys than queries: those of
    other ranks, under context parallelism. Without `key_rows` there is no prefix, and keys
    lie as the queries do. Both are cumulative lengths without the leading 0 of flash-attention's,
    and host integers, since the fused kernels take lists and must not wait for the device.

    A prompt p0 p1 p2 and its two responses a0 a1 and b0, packed as six tokens:

        token      p0 p1 p2 | a0 a1 | b0
        row         0  1  2 |  3  4 |  5

        segment    queries    keys              key_rows     sees
        prompt     0 1 2      p0 p1 p2          0 1 2        p0: p0   p1: p0 p1   p2: all three
        a          3 4        p0 p1 p2 a0 a1    0 1 2 3 4    a0: the prompt and a0   a1: all five
        b          5          p0 p1 p2 b0       0 1 2 5      b0: all four

    The lengths are 3 2 1 of queries and 3 5 4 of keys, so

    >>> segments = Segments(
    ...     [3, 5, 6], [3, 8, 12], torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5])
    ... )
    >>> x = torch.eye(6)[:, None]  # [T, heads, D]: token t is one at t
    >>> seen = packed_causal_attention(torch.zeros_like(x), x, x, segments, scale=1.0)
    >>> (seen[:, 0] > 0).int()
    tensor([[1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 1, 0],
            [1, 1, 1, 0, 0, 1]], dtype=torch.int32)
    """

    cu_seqlens_q: list[int]
    cu_seqlens_k: list[int]
    key_rows: torch.Tensor | None = None  # int64

    @classmethod
    def plain(cls, ends: list[int]) -> Segments:
        """Sequences laid end to end that see only themselves."""
        return cls(ends, ends)


def packed_causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    """Causal attention within the segments of a packed batch, with grouped queries. Differentiable.

    query [T, heads, D], key and value [T, kv heads, D], or more of them, of which `key_rows` are
    read. Returns [T, heads, D].
    """
    if attention_kernels.can_attend(query, key, value):
        ends = (segments.cu_seqlens_q, segments.cu_seqlens_k)
        return attention_kernels.attend(query, key, value, *ends, segments.key_rows, scale)
    if segments.key_rows is not None:
        key = key[segments.key_rows]
        value = value[segments.key_rows]
    if query.device.type == "npu":
        return npu.varlen_attention(
            query, key, value, segments.cu_seqlens_q, segments.cu_seqlens_k, scale
        )
    queries = _cut(query, segments.cu_seqlens_q)
    keys = _cut(key, segments.cu_seqlens_k)
    values = _cut(value, segments.cu_seqlens_k)
    outputs = [
        _attend_to_prefix_and_self(q, k, v, scale)
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _cut(x: torch.Tensor, ends: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Cut [T, heads, D] where segments end into [1, heads, t, D]. One split, since the backward
    pass of every slice would fill and add a gradient of all T tokens."""
    return x.transpose(0, 1)[None].split(np.diff(ends, prepend=0).tolist(), dim=2)


def _attend_to_prefix_and_self(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """One segment: query [1, heads, q, D], key and value [1, kv heads, k, D] -> [heads, q, D].

    Query i sees the keys 0 ... k - q + i, so the last one sees all.
    """
    num_queries = query.shape[2]
    num_keys = key.shape[2]
    if num_keys == num_queries:
        return _scaled_dot_product(query, key, value, scale)
    if num_queries * num_keys <= LARGEST_MASK:
        return _attend_by_mask(query, key, value, scale)
    return checkpoint(
        _attend_in_blocks, query, key, value, scale, use_reentrant=False, preserve_rng_state=False
    )


def _attend_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """The same, some queries at a time, each with the keys that they see: no mask is larger than
    LARGEST_MASK.

    Blocks of 2 of the queries 4 5 6 7 with the keys 0 to 7: 4 5 with 0 to 5, then 6 7 with 0 to 7.
    """
    num_queries = query.shape[2]
    num_keys = key.shape[2]
    size = max(1, LARGEST_MASK // num_keys)
    outputs = []
    for first in range(0, num_queries, size):
        block = query[:, :, first : first + size]
        seen = num_keys - num_queries + first + block.shape[2]
        outputs.append(_attend_by_mask(block, key[:, :, :seen], value[:, :, :seen], scale))
    return torch.cat(outputs, dim=1)


def _attend_by_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """The same by a mask of all queries and keys."""
    num_queries = query.shape[2]
    num_keys = key.shape[2]
    everything = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
    mask = everything.tril(num_keys - num_queries)
    return _scaled_dot_product(query, key, value, scale, mask)


def _scaled_dot_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """PyTorch's attention, causal without a mask: [heads, q, D]."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )[0]
