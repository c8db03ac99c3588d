"""Attention over packed sequences by PyTorch's operators: large masks are made in parts, and not kept."""

from __future__ import annotations

import pytest
import torch

from r1zero.ops import attention, attention_kernels
from r1zero.ops.attention import Segments, packed_causal_attention


def attended(segments, query, key, value):
    """The output, and what it keeps for the backward pass: the elements of its largest tensor; then
    the gradients."""
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    kept = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = packed_causal_attention(*inputs, segments, 0.3)
    largest = max(kept)
    output.square().sum().backward()
    return output.detach(), [x.grad for x in inputs], largest


@pytest.mark.parametrize("largest_mask", [1, 64, 500])
def test_a_large_mask_in_parts_changes_nothing_and_is_not_kept(monkeypatch, largest_mask):
    monkeypatch.setattr(attention_kernels, "can_attend", lambda *_: False)
    torch.manual_seed(0)
    query = torch.randn(37, 4, 2)
    key, value = torch.randn(2, 60, 2, 2)
    # 37 queries with 60 keys, 23 of them before the first
    segments = Segments([37], [60], torch.randperm(60))
    expected, gradients, kept = attended(segments, query, key, value)
    assert kept >= 37 * 60, "the mask"
    monkeypatch.setattr(attention, "LARGEST_MASK", largest_mask)
    found, found_gradients, kept = attended(segments, query, key, value)
    assert kept < 37 * 60
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for gradient, right in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(gradient, right, rtol=0, atol=1e-5)
