"""Log-probs and entropy of given tokens, vocabulary-parallel, without ever holding all logits.

The output layer is cut over the vocabulary (TP) and applied to a chunk of tokens at a time; the
backward pass builds each chunk's logits again. Peak memory is chunk x V / TP instead of tokens x V.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from r1zero.models.sizes import LOGIT_CHUNK_ELEMENTS
from r1zero.models.unused import blank


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    group: dist.ProcessGroup,
    unused: Sequence[slice] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden weight^T / temperature) at the targets, and the entropy of that softmax.

    hidden [R, H] equal on all TP ranks, weight [V / TP, H] this rank's rows, `unused` those of them
    that have no part in the softmax, targets int64 [R] global ids. Returns fp32 [R] and fp32 [R],
    differentiable; the gradient of `hidden` is this rank's part, that of unused rows is 0.
    """
    return _TokenLogProbs.apply(hidden, weight, targets, temperature, group, unused)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        group: dist.ProcessGroup,
        unused: Sequence[slice],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        normaliser = torch.empty_like(logprobs)
        for rows in _chunks(hidden, weight):
            logits = _logits(hidden[rows], weight, temperature, unused)
            normaliser[rows], mean, chosen = _reduce(logits, targets[rows], weight.shape[0], group)
            logprobs[rows] = chosen - normaliser[rows]
            entropy[rows] = normaliser[rows] - mean
        ctx.save_for_backward(hidden, weight, targets, normaliser, entropy)
        ctx.temperature = temperature
        ctx.group = group
        ctx.unused = unused
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: torch.Tensor, grad_entropy: torch.Tensor) -> tuple:
        """d logprob / d logit = [is target] - p and d entropy / d logit = -p (log p + entropy)."""
        hidden, weight, targets, normaliser, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None  # of a frozen output layer
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for rows in _chunks(hidden, weight):
            logits = _logits(hidden[rows], weight, ctx.temperature, ctx.unused)
            logp = logits.sub_(normaliser[rows, None])
            p = logp.exp()
            grad = logp.add_(entropy[rows, None]).mul_(-grad_entropy[rows, None])
            grad = grad.sub_(grad_logprobs[rows, None]).mul_(p)
            local, mine = _local(targets[rows], weight.shape[0], ctx.group)
            grad[torch.arange(len(local), device=local.device), local] += grad_logprobs[rows] * mine
            grad = grad.div_(ctx.temperature).to(weight.dtype)
            grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[rows]
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    size = max(1, LOGIT_CHUNK_ELEMENTS // weight.shape[0])
    return [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, temperature: float, unused: Sequence[slice]
) -> torch.Tensor:
    logits = (hidden @ weight.t()).float()
    if temperature != 1.0:
        logits.div_(temperature)
    return blank(logits, unused)


def _local(
    targets: torch.Tensor, rows: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row of each target in this rank's shard (0 where it lies elsewhere), and whether it lies
    here."""
    local = targets - dist.get_rank(group) * rows
    mine = (local >= 0) & (local < rows)
    return torch.where(mine, local, 0), mine


def _reduce(
    logits: torch.Tensor, targets: torch.Tensor, rows: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log-sum-exp, mean logit under the softmax and target logit, each [R], over the whole
    vocabulary."""
    top = logits.amax(dim=-1)
    parallel = dist.get_world_size(group) > 1
    if parallel:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    local, mine = _local(targets, rows, group)
    chosen = logits.gather(1, local[:, None])[:, 0] * mine
    weights = (logits - top[:, None]).exp_()
    parts = torch.stack([weights.sum(-1), (weights * logits).sum(-1), chosen])
    if parallel:
        dist.all_reduce(parts, group=group)
    total, weighted, chosen = parts
    return top + total.log(), weighted / total, chosen
