"""Log-probs and entropy in chunks of tokens: the same as from all logits at once, however many chunks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.multiproc import run_ranks

from r1zero.policy import logprobs

VOCAB = 40
UNUSED = slice(30, 34)


def made():
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, requires_grad=True)
    weight = torch.randn(VOCAB, 6, requires_grad=True)
    return hidden, weight, torch.randint(0, 30, (11,)), torch.randn(2, 11)


def chunks_body(rank, size, store, elements):
    """Both values, and the gradients of hidden states and weights, twice from one forward pass."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    logprobs.LOGIT_CHUNK_ELEMENTS = elements
    hidden, weight, targets, grads = made()
    found = logprobs.token_logprobs(
        hidden, weight, targets, 0.7, dist.group.WORLD, unused=(UNUSED,)
    )
    inputs = (hidden, weight)
    first = torch.autograd.grad(found, inputs, list(grads), retain_graph=True)
    again = torch.autograd.grad(found, inputs, list(grads))
    return [x.detach() for x in found], first, again


def main_grad_body(rank, size, store):
    """The gradient of the weights where Megatron sums it up, twice, and what autograd is handed."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    hidden, weight, targets, grads = made()
    sums = []
    for summed in (False, True):
        if summed:
            weight.main_grad = torch.ones(weight.shape)
        for _ in range(2):
            found = logprobs.token_logprobs(hidden, weight, targets, 0.7, dist.group.WORLD)
            torch.autograd.backward(found, list(grads))
        sums.append(weight.grad.clone())
    return *sums, weight.main_grad


def test_the_gradient_of_the_weights_goes_where_megatron_sums_it_up():
    ((plain, unchanged, main_grad),) = run_ranks(main_grad_body, 1)
    assert plain.abs().max() > 0.1 and torch.equal(plain, unchanged)
    torch.testing.assert_close(main_grad, plain + 1, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows_of_a_chunk", [1, 4, 11, 100])
def test_chunks_change_nothing(rows_of_a_chunk):
    hidden, weight, targets, grads = made()
    logits = hidden.double() @ weight.double().t() / 0.7
    logits[:, UNUSED] = -torch.inf
    logp = torch.log_softmax(logits, -1)
    expected = [
        logp.gather(1, targets[:, None])[:, 0],
        -torch.where(logp == -torch.inf, 0, logp.exp() * logp).sum(-1),
    ]
    # An entropy's own gradient meets 0 * inf there; the unused columns are left out instead.
    used = [column for column in range(VOCAB) if not UNUSED.start <= column < UNUSED.stop]
    logp = torch.log_softmax(logits[:, used], -1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(1, targets[:, None])[:, 0]
    right = torch.autograd.grad([chosen, entropy], (hidden, weight), list(grads.double()))
    ((found, first, again),) = run_ranks(chunks_body, 1, rows_of_a_chunk * VOCAB)
    for mine, value in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), value, rtol=0, atol=1e-5)
    for gradients in (first, again):
        for mine, value in zip(gradients, right, strict=True):
            torch.testing.assert_close(mine, value, rtol=0, atol=2e-5)
