"""RMSNorm, SwiGLU, RoPE and the vocabulary's softmax by row_kernels.cpp against PyTorch's operators in
float64, forward and backward, at widths that do not fill a vector."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.kernel_checks import expect_equal, need_kernels, with_gradients
from support.multiproc import run_ranks

from r1zero.ops import row_kernels
from r1zero.ops.norm import rms_norm
from r1zero.ops.rotary import rotate, rotate_packed
from r1zero.ops.swiglu import swiglu
from r1zero.ops.vocab import logits_gradient_, softmax_sums

# Relative to the largest element, at least 1. fp32: sums in another order. bf16: one rounding of the
# result, 2^-9.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
WIDTHS = [1, 7, 16, 67, 576]


@pytest.fixture(autouse=True)
def _kernels():
    need_kernels(row_kernels.SOURCE)


@pytest.fixture(params=TOLERANCE, ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("rows", [0, 1, 5, 64, 131])
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(dtype, rows, width):
    torch.manual_seed(0)
    x = torch.randn(rows, 1, width).to(dtype)
    weight = (torch.rand(width) + 0.5).to(dtype)
    assert row_kernels.can_run(x, weight)
    found = with_gradients(lambda x, weight: rms_norm(x, weight, 1e-5), x, weight)
    expected = with_gradients(
        lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-5), x.double(), weight.double()
    )
    expect_equal(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu(dtype, width):
    torch.manual_seed(0)
    x = torch.randn(5, 1, 2 * width) * 4
    x[0, 0, :width] = -200
    x[1, 0, :width] = 200
    x = x.to(dtype)

    def plainly(x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    expect_equal(with_gradients(swiglu, x), with_gradients(plainly, x.double()), TOLERANCE[dtype])


@pytest.mark.parametrize("half", [1, 8, 9, 32])
@pytest.mark.parametrize("gap", [0, 3])
def test_rotate(dtype, half, gap):
    """`gap`: heads are a part of a wider tensor."""
    torch.manual_seed(0)
    wide = torch.randn(6, 3 + gap, 2 * half).to(dtype)
    cos, sin = torch.randn(2, 6, 1, 2 * half).to(dtype)
    found = with_gradients(lambda x: rotate_packed(x[:, :3], cos, sin), wide)
    expected = with_gradients(lambda x: rotate(x[:, :3], cos.double(), sin.double()), wide.double())
    expect_equal(found, expected, TOLERANCE[dtype])


def test_rotate_without_tokens():
    x = torch.empty(0, 3, 8)
    assert rotate_packed(x, torch.empty(0, 1, 8), torch.empty(0, 1, 8)).shape == x.shape


def test_the_gradient_of_a_norm_is_the_same_for_any_number_of_threads():
    x = torch.randn(300, 67)
    expected = with_gradients(lambda x, w: rms_norm(x, w, 1e-5), x, torch.ones(67))
    threads = torch.get_num_threads()
    try:
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            found = with_gradients(lambda x, w: rms_norm(x, w, 1e-5), x, torch.ones(67))
            for mine, first in zip(found, expected, strict=True):
                assert torch.equal(mine, first)
    finally:
        torch.set_num_threads(threads)


def softmax_body(rank, size, store, dtype, vocab, kernels):
    """Log-prob and entropy of five rows whose columns the ranks share, and this rank's part of the
    gradient of the logits. The last columns of all are unused."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    if not kernels:
        row_kernels.can_run = lambda *_: False
    logits, targets, grads = softmax_case(dtype, vocab)
    columns = vocab // size
    own = logits[:, rank * columns : (rank + 1) * columns].clone()
    normaliser, mean = softmax_sums(own, 1 / 0.7, dist.group.WORLD)
    local = targets - rank * columns
    mine = (local >= 0) & (local < columns)
    gradient = logits_gradient_(
        own, 1 / 0.7, torch.where(mine, local, -1), normaliser, normaliser - mean, *grads
    )
    return normaliser, normaliser - mean, gradient


def softmax_case(dtype, vocab):
    torch.manual_seed(0)
    logits = (torch.randn(5, vocab) * 3).to(dtype)
    logits[:, vocab - vocab // 3 :] = -1e30
    logits[1, 0] = 40.0
    return logits, torch.tensor([0, 0, 1, vocab // 2, vocab // 4]), torch.randn(2, 5)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernel", "pytorch"])
@pytest.mark.parametrize(("size", "vocab"), [(1, 9), (1, 3001), (2, 46), (3, 3000)])
def test_softmax_over_the_vocabulary(dtype, size, vocab, kernels):
    logits, targets, (grad_logprobs, grad_entropy) = softmax_case(dtype, vocab)
    exact = logits.double().requires_grad_()
    logp = torch.log_softmax(exact / 0.7, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(1, targets[:, None])[:, 0]
    (chosen * grad_logprobs + entropy * grad_entropy).sum().backward()
    results = run_ranks(softmax_body, size, dtype, vocab, kernels)
    for normaliser, found, _ in results:
        torch.testing.assert_close(
            normaliser.double(), torch.logsumexp(exact.detach() / 0.7, -1), rtol=1e-6, atol=1e-5
        )
        torch.testing.assert_close(found.double(), entropy.detach(), rtol=1e-5, atol=1e-5)
    gradient = torch.cat([part for *_, part in results], dim=1).double()
    # 64 of exponent times 2^-24, or one rounding
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(gradient, exact.grad, rtol=tolerance, atol=1e-5)
