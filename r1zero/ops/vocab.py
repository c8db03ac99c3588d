"""The softmax over a vocabulary that is cut over ranks: sums of it, and the gradient of its logits.

On a CPU in one pass over the logits each, by row_kernels.cpp where there is a compiler; elsewhere by
PyTorch's operators, which copy them to fp32 first.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from r1zero.ops import row_kernels


def softmax_sums(
    logits: torch.Tensor, scale: float, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """log-sum-exp of scale * logits, and their mean under the softmax, over the columns of all ranks:
    [R, V / ranks] -> fp32 [R], fp32 [R].

    Each rank sums relative to its own largest logit, and its sums are then taken to the largest of all.
    """
    if row_kernels.can_run(logits):
        own_top, total, weighted = row_kernels.softmax_sums(logits, scale)
    else:
        own_top, total, weighted = _sums(logits, scale)
    top = own_top.clone()
    if dist.get_world_size(group) > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        below = own_top - top
        factor = below.exp()
        parts = torch.stack([total * factor, (weighted + below * total) * factor])
        dist.all_reduce(parts, group=group)
        total, weighted = parts
    return top + total.log(), top + weighted / total


def _sums(logits: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See row_kernels.softmax_sums. Takes the memory of two fp32 copies."""
    below = logits.to(torch.float32, copy=True).mul_(scale)
    top = below.amax(dim=-1)
    below.sub_(top[:, None])
    weights = below.exp()
    total = weights.sum(-1)
    return top, total, weights.mul_(below).sum(-1)


def logits_gradient_(
    logits: torch.Tensor,
    scale: float,
    targets: torch.Tensor,
    normaliser: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor,
) -> torch.Tensor:
    """The gradient of logits [R, V], perhaps in their place, from those of log-prob and entropy.

    With log p = scale * logits - normaliser: d logprob / d logit = scale ([is target] - p) and d entropy /
    d logit = -scale p (log p + entropy). targets int64 [R], columns of this rank, or -1 where the
    target is another's; the others fp32 [R].
    """
    rows = (normaliser, entropy, grad_logprobs, grad_entropy)
    if row_kernels.can_run(logits):
        contiguous = [row.contiguous() for row in rows]
        row_kernels.softmax_gradient_(logits, scale, targets.contiguous(), *contiguous)
        return logits
    normaliser, entropy, grad_logprobs, grad_entropy = (row[:, None] for row in rows)
    logp = logits.float().mul_(scale).sub_(normaliser)
    p = logp.exp()
    grad = logp.add_(entropy).mul_(-grad_entropy).sub_(grad_logprobs).mul_(p)
    grad.scatter_add_(1, targets.clamp(min=0)[:, None], grad_logprobs * (targets >= 0)[:, None])
    return grad.mul_(scale).to(logits.dtype)
