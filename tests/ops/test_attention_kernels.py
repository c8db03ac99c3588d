"""Packed attention by attention_kernels.cpp against PyTorch's in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
from support.kernel_checks import expect_equal, need_kernels, with_gradients

from r1zero.ops import attention_kernels
from r1zero.ops.attention import Segments, packed_causal_attention

# Relative to the largest element, at least 1. fp32: sums in another order. bf16: the result is rounded once, and so
# was each output that the gradient starts from.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}

# A prompt of 70 tokens with three responses; a prompt of one with two, of which one has one token.
SHARED = Segments(
    [70, 75, 205, 206, 207, 208, 308],
    [70, 145, 345, 416, 417, 419, 520],
    torch.cat(
        [
            torch.arange(70),
            torch.arange(75),
            torch.arange(70),
            torch.arange(75, 205),
            torch.arange(70),
            torch.tensor([205]),
            torch.tensor([206]),
            torch.tensor([206, 207]),
            torch.tensor([206]),
            torch.arange(208, 308),
        ]
    ),
)


@pytest.fixture(autouse=True)
def _kernels():
    need_kernels(attention_kernels.SOURCE)


def inputs(tokens, keys, heads, kv_heads, dim, value_dim, dtype):
    torch.manual_seed(0)
    shapes = ((tokens, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, value_dim))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def attended(x, segments):
    """The output, and the gradients of what is given for a fixed gradient of the output."""
    return with_gradients(lambda *parts: packed_causal_attention(*parts, segments, 0.3), *x)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim"),
    [(6, 2, 24, 24), (3, 3, 64, 64), (9, 3, 64, 64), (4, 1, 7, 13), (2, 2, 1, 1), (5, 1, 96, 80)],
)
def test_shared_prompts(heads, kv_heads, dim, value_dim, dtype):
    x = inputs(308, 308, heads, kv_heads, dim, value_dim, dtype)
    expected = attended([part.double() for part in x], SHARED)
    assert attention_kernels.can_attend(*x)
    expect_equal(attended(x, SHARED), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("lengths", [[1], [64], [65, 0, 3], [300], [128, 1, 47, 49]])
def test_plain_segments_of_any_length(lengths):
    segments = Segments.plain(torch.tensor(lengths).cumsum(0).tolist())
    x = inputs(sum(lengths), sum(lengths), 4, 2, 16, 16, torch.float32)
    expected = attended([part.double() for part in x], segments)
    expect_equal(attended(x, segments), expected, 2e-6)


def test_no_tokens():
    x = inputs(0, 0, 4, 2, 16, 16, torch.float32)
    out, *grads = attended(x, Segments([], [], torch.empty(0, dtype=torch.int64)))
    assert out.shape == (0, 4, 16) and [len(grad) for grad in grads] == [0, 0, 0]


def test_keys_in_any_order_with_some_that_nobody_sees():
    """As under context parallelism, whose keys come from other ranks."""
    torch.manual_seed(3)
    rows = torch.cat([torch.randperm(90)[:80], torch.randperm(90)[:85]])
    segments = Segments([20, 90], [80, 165], rows)
    x = inputs(90, 90, 4, 2, 16, 16, torch.float32)
    expect_equal(attended(x, segments), attended([part.double() for part in x], segments), 2e-6)


def test_parts_of_a_wider_tensor():
    """Queries, keys and values as one product gives them: a token's heads side by side, then a gap."""
    torch.manual_seed(4)
    wide = torch.randn(308, 8, 16)
    segments = SHARED
    views = [wide[:, :4], wide[:, 4:6], wide[:, 6:]]
    out = packed_causal_attention(*views, segments, 0.3)
    expected = packed_causal_attention(*(view.double() for view in views), segments, 0.3)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_bit_for_bit_the_same_for_any_number_of_threads():
    x = inputs(308, 308, 6, 2, 24, 24, torch.float32)
    threads = torch.get_num_threads()
    expected = attended(x, SHARED)
    try:
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            for mine, first in zip(attended(x, SHARED), expected, strict=True):
                assert torch.equal(mine, first)
    finally:
        torch.set_num_threads(threads)


def test_a_query_does_not_depend_on_what_comes_behind_it():
    x = inputs(308, 308, 6, 2, 24, 24, torch.float32)
    out = packed_causal_attention(*x, Segments.plain([308]), 0.3)
    for part in x:
        part[200:] = torch.nan
    again = packed_causal_attention(*x, Segments.plain([308]), 0.3)
    assert torch.equal(again[:192], out[:192]) and again[200:].isnan().all()
