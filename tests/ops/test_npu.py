"""The fused operators of NPUs on the stand-in, against plain PyTorch in fp32: shapes, layouts and
gradients of our calls. What the kernels compute on hardware is not shown."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from support.launches import Launches
from support.npu_process import on_npu

from r1zero.ops import npu
from r1zero.ops.attention import Segments, packed_causal_attention
from r1zero.ops.norm import rms_norm
from r1zero.ops.rotary import rotate, rotate_packed

# Of bf16, which keeps 8 bits: a few roundings.
BF16 = 2e-2


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape and found.device.type == "npu"
    return float((found.float().cpu() - expected.float()).abs().max())


def norm(shape: tuple[int, ...]) -> tuple[float, float, float]:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.rand(shape[-1], requires_grad=True)
    expected = F.rms_norm(x, weight.shape, weight, 1e-5)
    expected.square().sum().backward()
    there = x.detach().to("npu").requires_grad_()
    weight_there = weight.detach().to("npu").requires_grad_()
    found = rms_norm(there, weight_there, 1e-5)
    found.square().sum().backward()
    return (
        largest_difference(found, expected),
        largest_difference(there.grad, x.grad),
        largest_difference(weight_there.grad, weight.grad),
    )


@pytest.mark.parametrize("shape", [(5, 64), (3, 2, 4, 16)])
def test_rms_norm_and_its_gradients(shape):
    assert max(on_npu(norm, shape)) < 1e-5


def add_rms_norm() -> tuple[float, float]:
    torch.manual_seed(0)
    x, delta = torch.randn(2, 5, 64)
    weight = torch.rand(64)
    normed, total = npu.add_rms_norm(x.to("npu"), delta.to("npu"), weight.to("npu"), 1e-5)
    expected = F.rms_norm(x + delta, (64,), weight, 1e-5)
    return largest_difference(normed, expected), largest_difference(total, x + delta)


def test_add_and_norm_return_the_norm_and_the_sum():
    norm, total = on_npu(add_rms_norm)
    assert norm < 1e-5 and total == 0


def swiglu() -> float:
    torch.manual_seed(0)
    x = torch.randn(5, 96)
    gate, up = x.chunk(2, dim=-1)
    return largest_difference(npu.swiglu(x.to("npu")), F.silu(gate) * up)


def test_swiglu_takes_the_gate_from_the_first_half():
    assert on_npu(swiglu) < 1e-6


def rotary(x_shape: tuple[int, ...], table_shape: tuple[int, ...]) -> tuple[float, float]:
    torch.manual_seed(0)
    x = torch.randn(x_shape, requires_grad=True)
    cos, sin = torch.randn(2, *table_shape)
    expected = rotate(x, cos, sin)
    expected.square().sum().backward()
    there = x.detach().to("npu").requires_grad_()
    found = npu.rotary_mul(there, cos.to("npu"), sin.to("npu"))
    found.square().sum().backward()
    return largest_difference(found, expected), largest_difference(there.grad, x.grad)


@pytest.mark.parametrize(
    ("x", "table"),
    [
        ((2, 7, 3, 16), (2, 7, 1, 16)),  # keys and values of the rollout
        ((7, 3, 5, 16), (7, 1, 1, 16)),  # its queries, by kv head
    ],
)
def test_rope_and_its_gradient_in_each_layout_that_is_used(x, table):
    assert max(on_npu(rotary, x, table)) < 1e-5


def packed_rotary() -> tuple[float, float]:
    torch.manual_seed(0)
    x = torch.randn(7, 6, 16, requires_grad=True)
    cos, sin = torch.randn(2, 7, 1, 16)
    expected = rotate_packed(x, cos, sin)
    expected.square().sum().backward()
    there = x.detach().to("npu").requires_grad_()
    found = rotate_packed(there, cos.to("npu"), sin.to("npu"))
    found.square().sum().backward()
    return largest_difference(found, expected), largest_difference(there.grad, x.grad)


def test_rope_of_packed_tokens_and_its_gradient():
    assert max(on_npu(packed_rotary)) < 1e-5


def paged(heads: int, kv_heads: int, dim: int, block: int, lengths: list[int]) -> float:
    """Tokens are written one by one into blocks in any order, then each row attends."""
    torch.manual_seed(0)
    rows = len(lengths)
    width = max(-(-length // block) for length in lengths) + 1  # wider than needed
    table = torch.randperm(rows * width).view(rows, width).int()
    keys = torch.randn(rows, max(lengths), kv_heads, dim).bfloat16()
    values = torch.randn_like(keys)
    query = torch.randn(rows, heads, dim).bfloat16()
    caches = torch.zeros(2, rows * width, block, kv_heads, dim).bfloat16().to("npu")
    for place in range(max(lengths)):
        alive = [row for row in range(rows) if lengths[row] > place]
        slots = table[alive, place // block].long() * block + place % block
        npu.write_cache(
            keys[alive, place].to("npu"), values[alive, place].to("npu"), *caches, slots.to("npu")
        )
    found = npu.paged_attention(query.to("npu"), *caches, table.to("npu"), lengths)
    expected = []
    for row, length in enumerate(lengths):
        q = query[row, :, None].float()
        k, v = (x[row, :length].transpose(0, 1).float() for x in (keys, values))
        output = F.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=True)
        expected.append(output.flatten())
    return largest_difference(found, torch.stack(expected))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 4, 16), (14, 2, 64), (6, 2, 64), (4, 1, 128)]
)
def test_decode_attention_over_shuffled_blocks_sees_each_rows_tokens(heads, kv_heads, dim):
    assert on_npu(paged, heads, kv_heads, dim, 16, [1, 15, 16, 17, 40]) < BF16


def test_decode_attention_with_the_block_size_of_npus():
    assert on_npu(paged, 4, 2, 64, 128, [127, 128, 129]) < BF16


def paged_latents(heads: int, block: int, lengths: list[int]) -> float:
    """The same of latent attention: a latent and a key of each token, which all heads share."""
    torch.manual_seed(0)
    rows = len(lengths)
    width = max(-(-length // block) for length in lengths) + 1
    table = torch.randperm(rows * width).view(rows, width).int()
    latents = torch.randn(rows, max(lengths), 1, 512).bfloat16()
    keys = torch.randn(rows, max(lengths), 1, 64).bfloat16()
    query = torch.randn(heads, rows, 512).bfloat16().transpose(0, 1)  # lies head by head
    turned = torch.randn(rows, heads, 64).bfloat16()
    of_latents = torch.zeros(rows * width, block, 1, 512).bfloat16().to("npu")
    of_keys = torch.zeros(rows * width, block, 1, 64).bfloat16().to("npu")
    for place in range(max(lengths)):
        alive = [row for row in range(rows) if lengths[row] > place]
        slots = table[alive, place // block].long() * block + place % block
        new = keys[alive, place].to("npu"), latents[alive, place].to("npu")
        npu.write_cache(*new, of_keys, of_latents, slots.to("npu"))
    caches = of_latents, of_keys
    found = npu.paged_latent_attention(
        query.to("npu"), turned.to("npu"), *caches, table.to("npu"), lengths, 0.05
    )
    expected = []
    for row, length in enumerate(lengths):
        latent = latents[row, :length, 0].float()
        scores = query[row].float() @ latent.T
        scores += turned[row].float() @ keys[row, :length, 0].float().T
        expected.append((0.05 * scores).softmax(-1) @ latent)
    return largest_difference(found, torch.stack(expected))


@pytest.mark.parametrize("heads", [1, 2, 3, 16, 20, 128])
def test_decode_attention_to_latents_sees_each_rows_tokens(heads):
    """The operator takes powers of two; 20 are the heads of GLM-4.7-Flash."""
    assert on_npu(paged_latents, heads, 16, [1, 15, 16, 17, 40]) < BF16


def test_decode_attention_to_latents_with_the_block_size_of_npus():
    assert on_npu(paged_latents, 4, 128, [127, 128, 129]) < BF16


@pytest.mark.parametrize(
    ("sizes", "taken"),
    [
        ((512, 64, 128), True),  # DeepSeek-V3
        ((512, 64, 8), True),  # Moonlight on two ranks
        ((512, 64, 7), True),
        ((512, 64, 129), False),
        ((256, 64, 16), False),
        ((512, 32, 16), False),
    ],
)
def test_sizes_of_latent_attention_that_the_fused_operator_takes(sizes, taken):
    assert npu.takes_latents(*sizes) == taken


def varlen(ends: list[int], key_ends: list[int], rows: list[int] | None) -> list[float]:
    torch.manual_seed(0)
    inputs = [torch.randn(ends[-1], heads, 16) for heads in (4, 2, 2)]
    here = [x.clone().requires_grad_() for x in inputs]
    there = [x.to("npu").requires_grad_() for x in inputs]
    key_rows = None if rows is None else torch.tensor(rows)
    expected = packed_causal_attention(*here, Segments(ends, key_ends, key_rows), 0.25)
    on_device = None if key_rows is None else key_rows.to("npu")
    found = packed_causal_attention(*there, Segments(ends, key_ends, on_device), 0.25)
    expected.square().sum().backward()
    found.square().sum().backward()
    return [
        largest_difference(found, expected),
        *(largest_difference(x.grad, y.grad) for x, y in zip(there, here, strict=True)),
    ]


@pytest.mark.parametrize(
    ("ends", "key_ends", "rows"),
    [
        ([3, 4, 9], [3, 4, 9], None),
        ([3, 5, 6], [3, 8, 12], [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5]),  # a prompt, two responses
    ],
)
def test_attention_of_the_trainer_and_its_gradients(ends, key_ends, rows):
    assert max(on_npu(varlen, ends, key_ends, rows)) < 1e-5


def many_sequences(count: int) -> tuple[list[float], int]:
    """Sequences of 1, 2, 3, 1, ... tokens, the odd ones with a key before their own; and how many
    calls their attention took."""
    ends: list[int] = []
    key_ends: list[int] = []
    rows: list[int] = []
    for number in range(count):
        begin = ends[-1] if ends else 0
        end = begin + number % 3 + 1
        keys = [0] * (number % 2) + list(range(begin, end))
        rows += keys
        ends.append(end)
        key_ends.append(len(rows))
    with patch.object(npu, "_fusion_attention", wraps=npu._fusion_attention) as call:
        off = varlen(ends, key_ends, rows)
    return off, call.call_count


@pytest.mark.parametrize(("count", "calls"), [(1024, 1), (1025, 2), (2100, 3)])
def test_more_sequences_than_a_call_may_have_go_through_several(count, calls):
    off, made = on_npu(many_sequences, count)
    # The key that half of them share sums its gradient in another order.
    assert max(off) < 1e-3 and made == calls


def masks_made() -> tuple[int, bool]:
    """Launches that make a mask, of three calls, the first in generation and two with gradients;
    and whether it is of inference mode, so that on hardware no gradient could keep it."""
    npu._causal_mask.cache_clear()
    segments = Segments.plain([4])
    with Launches() as seen:
        for gradient in (False, True, True):
            query, key, value = (
                torch.randn(4, heads, 16).to("npu").requires_grad_(gradient) for heads in (4, 2, 2)
            )
            with torch.inference_mode(not gradient):
                output = packed_causal_attention(query, key, value, segments, 0.25)
            if gradient:
                output.sum().backward()
    return seen.counted["aten::triu"], npu._causal_mask(query.device).is_inference()


def test_the_causal_mask_is_made_once_though_generation_needs_it_first():
    assert on_npu(masks_made) == (1, False)
