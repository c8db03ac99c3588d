"""Log-probs and entropy of given tokens, vocabulary-parallel, without ever holding all logits.

The output layer is cut over the vocabulary (TP) and applied to a chunk of tokens at a time; the
backward pass builds each chunk's logits again, but for the last. Peak memory is chunk x V / TP instead of
tokens x V.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from r1zero.models.sizes import LOGIT_CHUNK_ELEMENTS
from r1zero.models.unused import blank
from r1zero.ops.vocab import logits_gradient_, softmax_sums


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
        local, mine = _local(targets, weight.shape[0], group)
        logits = None
        for rows in _chunks(hidden, weight):
            logits = None  # of the chunk before, so that there is never more than one
            logits = _logits(hidden[rows], weight, unused)
            normaliser[rows], mean = softmax_sums(logits, 1 / temperature, group)
            entropy[rows] = normaliser[rows] - mean
            logprobs[rows] = _chosen(logits, local[rows], mine[rows], group) / temperature
        logprobs -= normaliser
        ctx.save_for_backward(hidden, weight, torch.where(mine, local, -1), normaliser, entropy)
        # The backward pass begins with the last chunk and need not build its logits again.
        ctx.last_logits = logits
        # Where Megatron sums this weight's gradients up, in fp32: no copy of the vocabulary's size is made.
        ctx.main_grad = getattr(weight, "main_grad", None)
        ctx.temperature = temperature
        ctx.unused = unused
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: torch.Tensor, grad_entropy: torch.Tensor) -> tuple:
        hidden, weight, targets, normaliser, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None  # of a frozen output layer
        if ctx.needs_input_grad[1]:
            grad_weight = ctx.main_grad
            if grad_weight is None:
                grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        logits = ctx.last_logits
        ctx.last_logits = None  # its gradient takes its place
        for rows in reversed(_chunks(hidden, weight)):
            if logits is None:
                logits = _logits(hidden[rows], weight, ctx.unused)
            of_rows = (normaliser, entropy, grad_logprobs, grad_entropy)
            grad = logits_gradient_(
                logits, 1 / ctx.temperature, targets[rows], *(values[rows] for values in of_rows)
            )
            logits = None
            grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                _add_product_(grad_weight, grad.t(), hidden[rows])
            del grad  # before the next chunk's logits are made
        if grad_weight is ctx.main_grad:
            grad_weight = None  # it is where it would be added to
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, with the product rounded to its own type first."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    size = max(1, LOGIT_CHUNK_ELEMENTS // weight.shape[0])
    return [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]


def _logits(hidden: torch.Tensor, weight: torch.Tensor, unused: Sequence[slice]) -> torch.Tensor:
    return blank(hidden @ weight.t(), unused)


def _local(
    targets: torch.Tensor, rows: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row of each target in this rank's shard (0 where it lies elsewhere), and whether it lies
    here."""
    local = targets - dist.get_rank(group) * rows
    mine = (local >= 0) & (local < rows)
    return torch.where(mine, local, 0), mine


def _chosen(
    logits: torch.Tensor, local: torch.Tensor, mine: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """The logit of each target, from the rank that has it: fp32 [R]."""
    chosen = logits.gather(1, local[:, None])[:, 0].float() * mine
    if dist.get_world_size(group) > 1:
        dist.all_reduce(chosen, group=group)
    return chosen
