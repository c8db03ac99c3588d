"""Mixture of experts by PyTorch on any device: grouped products over the tokens of each expert.

Every TP rank has all tokens of its replica and some experts whole, so a rank computes the copies of
tokens that go to its own experts, and the sum over ranks that ends every MLP adds up the rest.
Three tokens with two experts each, on the rank that holds experts 2 and 3 of four:

    ids         token 0: 3 1     token 1: 2 3     token 2: 0 1
    copies         0    1           2    3           4    5      copy = 2 * token + place
    sorted by expert:  0: 4   1: 1 5   2: 2   3: 0 3
    of this rank:      copies 2 | 0 3, that is tokens 1 | 0 1;   counts 1 2
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from r1zero.models.family import LocalExperts


def multiply_by_experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: LocalExperts,
    silu_mul: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What the experts of this rank add to each token: x [T, H] -> [T, H].

    ids int64 [T, k] and weights fp32 [T, k] say which experts a token goes to, and what each
    counts. A weight multiplies the activation in fp32, before the second product, as Megatron does:
    so that both round alike.
    """
    top_k = ids.shape[1]
    copies, counts = copies_by_expert(ids, experts)
    tokens = copies // top_k
    scales = weights.flatten()[copies][:, None]
    found = []
    begin = 0
    rows = x[tokens]
    for number, count in enumerate(counts):
        if count:
            end = begin + count
            hidden = silu_mul(F.linear(rows[begin:end], experts.gate_up[number]))
            scaled = (hidden * scales[begin:end]).to(x.dtype)
            found.append(F.linear(scaled, experts.down[number]))
            begin = end
    output = torch.zeros_like(x)
    if found:
        output.index_add_(0, tokens, torch.cat(found))
    return output


def copies_by_expert(ids: torch.Tensor, experts: LocalExperts) -> tuple[torch.Tensor, list[int]]:
    """The copies of tokens that go to this rank's experts, in their order, and how many to each.

    >>> ids = torch.tensor([[3, 1], [2, 3], [0, 1]])
    >>> held = LocalExperts(torch.empty(2, 8, 4), torch.empty(2, 4, 4), first=2, total=4)
    >>> copies, counts = copies_by_expert(ids, held)
    >>> copies.tolist(), counts
    ([2, 0, 3], [1, 2])
    """
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts.total).tolist()
    first = experts.first
    end = first + len(experts.gate_up)
    begin = sum(counts[:first])
    local = counts[first:end]
    return order[begin : begin + sum(local)], local
