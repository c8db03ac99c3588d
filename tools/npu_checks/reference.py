"""What operators compute, in plain PyTorch on the CPU, and how far two results lie apart.

Each function works in the type of its inputs: in fp32 it is the truth, in bf16 what the same
formula loses by rounding after every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Rows that are smaller than this part of the mean row are measured against that, and not by themselves.
SMALLEST_ROW = 0.01


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor | None
) -> torch.Tensor:
    """softmax(q k / sqrt(D)) v with grouped queries.

    query [q, heads, D], keys and values [k, kv heads, D], `hidden` bool [q, k]: True is not seen.
    Returns [q, heads, D].
    """
    times = query.shape[1] // keys.shape[1]
    k = keys.repeat_interleave(times, dim=1)
    v = values.repeat_interleave(times, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, k) * query.shape[2] ** -0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v)


def attend_packed(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    segments: Sequence[tuple[range, list[int]]],
) -> torch.Tensor:
    """Causal attention of segments: (rows of its queries, rows of its keys), the prefix first.

    The last query of a segment sees all its keys, the one before it all but the last.
    """
    outputs = []
    for queries, rows in segments:
        last_seen = torch.arange(len(queries))[:, None] + len(rows) - len(queries)
        hidden = torch.arange(len(rows))[None] > last_seen
        picked = torch.tensor(rows)
        outputs.append(
            attend(query[queries.start : queries.stop], keys[picked], values[picked], hidden)
        )
    return torch.cat(outputs)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    first: int,
) -> torch.Tensor:
    """The weighted sum of a gated MLP for each expert of a token that is among those given.

    x [T, H], ids and weights [T, k], gate_up [E, 2 F, H] and down [E, H, F] of the experts from
    number `first` on. Returns [T, H].
    """
    output = torch.zeros_like(x)
    for number in range(len(gate_up)):
        weight = (weights * (ids == first + number)).sum(dim=-1, keepdim=True).to(x.dtype)
        hidden = swiglu(x @ gate_up[number].T)
        output += (hidden * weight) @ down[number].T
    return output


def rotate_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs (x[i], x[i + D/2]) by the angle of their position: cos, sin [..., D]."""
    half = x.shape[-1] // 2
    a = x[..., :half]
    b = x[..., half:]
    first = a * cos[..., :half] - b * sin[..., :half]
    second = b * cos[..., half:] + a * sin[..., half:]
    return torch.cat([first, second], dim=-1)


def halves(x: torch.Tensor) -> torch.Tensor:
    """Pairs of columns that lie side by side, (x[0], x[1]), (x[2], x[3]), as rotate_half has them."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def rotary_angles(positions: torch.Tensor, dim: int, theta: float) -> torch.Tensor:
    """Angle of each position and element, fp32 [T, D]: pairs lie half a head apart."""
    steps = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    angles = positions.double()[:, None] / theta ** steps[None]
    return torch.cat([angles, angles], dim=-1).float()


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest error of a row (along the last axis), relative to that row of the truth.

    So a single wrong row counts in full, however many are right. Not a number stays none.
    """
    wrong = (found.detach().cpu().double() - truth.double()).flatten(0, -2).norm(dim=-1)
    size = truth.double().flatten(0, -2).norm(dim=-1)
    typical = size.square().mean().sqrt()
    return float((wrong / size.clamp(min=float(SMALLEST_ROW * typical))).max())
