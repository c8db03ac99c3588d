"""Collectives of context parallelism: what they return, and their gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from support.multiproc import run_ranks

from r1zero.ops.token_gather import gather_tokens, join_rows

RANKS = 3


def gather_body(rank, size, store):
    """Gather two tokens of each rank; each weighs all of them in its own way."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    torch.manual_seed(rank)
    own = torch.randn(2, 4, 5, requires_grad=True)
    gathered = gather_tokens(own, dist.group.WORLD)
    weights = torch.randn(2 * size, 4, 5)
    (gathered * weights).sum().backward()
    alone = dist.new_group([rank], use_local_synchronization=True)
    assert gather_tokens(own, None) is own and gather_tokens(own, alone) is own
    return own.detach(), gathered.detach(), weights, own.grad


def test_tokens_lie_in_the_order_of_ranks_and_their_gradients_add_up():
    found = run_ranks(gather_body, RANKS)
    expected = torch.cat([own for own, *_ in found])
    total = sum(weights for _, _, weights, _ in found)
    for rank, (_, gathered, _, gradient) in enumerate(found):
        assert torch.equal(gathered, expected)
        torch.testing.assert_close(gradient, total[2 * rank : 2 * rank + 2])


ROWS = [[0, 3], [], [2, 1]]  # of four rows, by rank


def join_body(rank, size, store):
    """A loss of all rows, whose values are the row numbers in powers of ten."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    rows = torch.tensor(ROWS[rank], dtype=torch.int64)
    own = torch.stack([rows + 1.0, 10.0 * (rows + 1)]).requires_grad_()
    joined = join_rows(own, rows, 4, dist.group.WORLD)
    joined.prod(dim=1).sum().backward()
    return joined.detach(), own.grad


def test_each_rank_has_all_rows_and_the_gradient_of_its_own():
    values = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40]], requires_grad=True)
    values.prod(dim=1).sum().backward()
    found = run_ranks(join_body, RANKS)
    for rows, (joined, gradient) in zip(ROWS, found, strict=True):
        assert torch.equal(joined, values.detach())
        torch.testing.assert_close(gradient, values.grad[:, rows])
