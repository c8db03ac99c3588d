"""Context parallelism: gather what other ranks computed of their tokens (all-gather), differentiable.

The ranks of a group share the tokens of one microbatch. Everything but attention and the loss works
on each token by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def gather_tokens(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Lay the tokens of all ranks of a group end to end: [t, ...] of each -> [ranks * t, ...].

    t is the same on all ranks. Where tensor parallelism cuts the tokens once more (sequence
    parallelism), gather over its ranks first: `x` has all t tokens of this rank's place in the
    group. In the backward pass each rank gets the sum of what all ranks say of its tokens
    (reduce-scatter). Without a group, or in one of one rank, this is `x`.
    """
    if group is None or dist.get_world_size(group) == 1:
        return x
    return _GatherTokens.apply(x, group)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        gathered = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        own = grad.new_empty(len(grad) // dist.get_world_size(ctx.group), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None


def join_rows(
    own: torch.Tensor, own_rows: torch.Tensor, num_rows: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """Put values of all rows together of which each rank has some: [n, own rows] -> [n, rows].

    `own_rows` int64: which they are; every row is one rank's. Only the rank's own carry a gradient.
    So each rank may compute the same loss of all rows: it takes the gradient of its own ones, other
    ranks take that of theirs, and over the ranks the gradients of parameters add up to the whole.

    Rows 0 and 3 of four on one rank, 1 and 2 on the other:

        own        [a d], rows [0 3]      [b c], rows [1 2]
        both sum   [a 0 0 d]          +   [0 b c 0]           =  [a b c d]
    """
    rows = own.new_zeros(len(own), num_rows)
    rows[:, own_rows] = own.detach()
    dist.all_reduce(rows, group=group)
    return rows.index_copy(1, own_rows, own)
