"""How routes travel: the experts that tokens went to, as one flat buffer (routing replay).

A buffer is bytes of one tensor, arrays end to end without padding:

    int64   layers with experts, experts per token, number of prompts, number of samples
    int64   a row for each prompt: its position, its tokens
    int64   a row for each sample: its number in the batch, its tokens but the last one
    uint8   expert ids [tokens, layers, experts per token] of each prompt, then of each sample

Of a model with 2 such layers and 4 experts per token, a prompt of 5 tokens with two responses of 3
and 1: 4 * 8 bytes, then 16 and 2 * 16 for the rows, and (5 + 2 + 0) * 2 * 4 ids.

Prompts and samples without routes are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from r1zero.types import RecordedRoutes

HEAD = 4  # numbers before the rows
ROW = 2  # numbers of a row


def pack_routes(routes: RecordedRoutes) -> torch.Tensor:
    """Lay routes into a buffer, uint8 [bytes]."""
    prompts = list(routes.prompts.values())
    samples = list(routes.samples.values())
    arrays = prompts + samples
    layers, top_k = (0, 0) if not arrays else arrays[0].shape[1:]
    numbers = [layers, top_k, len(prompts), len(samples)]
    numbers += _rows(routes.prompts)
    numbers += _rows(routes.samples)
    table = np.array(numbers, np.int64)
    buffer = torch.empty(table.nbytes + sum(array.nbytes for array in arrays), dtype=torch.uint8)
    flat = [np.ascontiguousarray(array, np.uint8).reshape(-1) for array in arrays]
    np.concatenate([table.view(np.uint8), *flat], out=buffer.numpy())
    return buffer


def unpack_routes(buffer: torch.Tensor) -> RecordedRoutes:
    """The inverse of `pack_routes`. Arrays are views of the buffer."""
    content = buffer.numpy()
    at = 8 * HEAD
    layers, top_k, num_prompts, num_samples = content[:at].view(np.int64).tolist()
    end = at + 8 * ROW * (num_prompts + num_samples)
    rows = content[at:end].view(np.int64).reshape(-1, ROW).tolist()
    found: list[tuple[int, np.ndarray]] = []
    for number, tokens in rows:
        begin = end
        end += tokens * layers * top_k
        found.append((number, content[begin:end].reshape(tokens, layers, top_k)))
    assert end == len(content), "a buffer is read to its end"
    return RecordedRoutes(prompts=dict(found[:num_prompts]), samples=dict(found[num_prompts:]))


def _rows(routes: Mapping[int, np.ndarray]) -> list[int]:
    """Number and tokens of each, one after the other."""
    numbers: list[int] = []
    for number, ids in routes.items():
        numbers += [number, len(ids)]
    return numbers
